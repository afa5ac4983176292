"""Chats are rendered as transformers renders them, and only answers carry loss."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tandem.data.tokenize import EOS, Encoded, TextEncoder, train_tokenizer
from tandem.errors import DataError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["What does os.path.join do? It joins paths. naïve façade"] * 20, path, vocab_size=320)
    return path


@pytest.fixture(scope="module")
def encoder(folder: Path) -> TextEncoder:
    return TextEncoder(str(folder))


CHATS = [
    [{"role": "user", "content": "What does os.path.join do?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello\n<there> & 'you'"}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}],
]


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("generation", [True, False])
def test_a_chat_is_rendered_and_encoded_as_transformers_does(folder: Path, encoder: TextEncoder, chat, generation):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folder)
    text = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=generation)
    assert encoder.render(chat, add_generation_prompt=generation) == text
    ids = theirs.apply_chat_template(chat, tokenize=True, add_generation_prompt=generation, return_dict=True)[
        "input_ids"
    ]
    assert encoder.tokenizer.encode(text, add_special_tokens=False).ids == ids
    assert theirs("plain text").input_ids == encoder.tokenizer.encode("plain text").ids
    assert (theirs.eos_token_id, theirs.pad_token_id) == (encoder.token_id("eos_token"), encoder.pad_id)


def test_only_the_answer_and_its_end_carry_loss(encoder: TextEncoder):
    (encoded,) = encoder.pairs([("What is it?", "A naïve path.")])
    learned = [i for i, wanted in zip(encoded.ids, encoded.targets, strict=True) if wanted]
    assert encoder.tokenizer.decode(learned, skip_special_tokens=False) == f"A naïve path.{EOS}"
    asked = encoder.render([{"role": "user", "content": "What is it?"}], add_generation_prompt=True)
    prompt = [i for i, wanted in zip(encoded.ids, encoded.targets, strict=True) if not wanted]
    assert prompt == encoder.tokenizer.encode(asked, add_special_tokens=False).ids


def test_both_answers_of_a_preference_follow_the_same_prompt(encoder: TextEncoder):
    question = [{"role": "user", "content": "What is it?"}]
    ((chosen, rejected),) = encoder.preferences([(question, "A path.", "No idea at all.")])
    assert [chosen] == list(encoder.pairs([("What is it?", "A path.")]))
    assert [rejected] == list(encoder.pairs([("What is it?", "No idea at all.")]))


def test_a_preference_after_a_chat_has_loss_on_its_last_answer_only(encoder: TextEncoder):
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is it?"},
        {"role": "assistant", "content": "A path."},
        {"role": "user", "content": "Which one?"},
    ]
    ((chosen, _),) = encoder.preferences([(chat, "This one.", "No idea.")])
    learned = [i for i, wanted in zip(chosen.ids, chosen.targets, strict=True) if wanted]
    assert encoder.tokenizer.decode(learned, skip_special_tokens=False) == f"This one.{EOS}"
    before = encoder.render(chat, add_generation_prompt=True)
    assert chosen.ids[: -len(learned)] == encoder.tokenizer.encode(before, add_special_tokens=False).ids


def test_loss_on_all_covers_the_prompt_too(encoder: TextEncoder):
    (encoded,) = encoder.pairs([("What?", "That.")], loss_on_all=True)
    assert all(encoded.targets)


def test_a_text_begins_and_ends_with_its_tokens(encoder: TextEncoder):
    (encoded,) = encoder.texts(["one two"])
    assert encoded.ids[0] == encoder.token_id("bos_token")
    assert encoded.ids[-1] == encoder.token_id("eos_token")
    assert encoder.tokenizer.decode(encoded.ids) == "one two"


def test_any_text_comes_back_from_its_ids(encoder: TextEncoder):
    for text in ("tab\tand\nnewline", "emoji 🦜 and 中文", "  spaces  "):
        assert encoder.tokenizer.decode(next(encoder.texts([text])).ids) == text


def test_pairs_without_a_chat_template_are_refused(tmp_path: Path, folder: Path):
    (tmp_path / "tokenizer.json").write_text((folder / "tokenizer.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(DataError, match="no chat template"):
        list(TextEncoder(str(tmp_path)).pairs([("q", "a")]))


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match="tokenizer"):
        list(TextEncoder(str(tmp_path)).texts(["a"]))


CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is it?"},
    {"role": "assistant", "content": "A path."},
    {"role": "user", "content": "And that?"},
    {"role": "assistant", "content": "Another naïve one."},
    {"role": "user", "content": "Thanks."},
]


def learned(encoder: TextEncoder, encoded: Encoded) -> str:
    ids = [i for i, wanted in zip(encoded.ids, encoded.targets, strict=True) if wanted]
    return str(encoder.tokenizer.decode(ids, skip_special_tokens=False))


def test_of_a_chat_only_what_the_assistant_says_carries_loss(encoder: TextEncoder):
    (encoded,) = encoder.chats([CHAT])
    assert learned(encoder, encoded) == f"A path.{EOS}Another naïve one.{EOS}"
    whole = encoder.tokenizer.decode(encoded.ids, skip_special_tokens=False)
    # Nothing learns from what follows the last answer.
    assert whole == encoder.render(CHAT[:5])
    (everything,) = encoder.chats([CHAT], loss_on_all=True)
    assert everything.ids == encoded.ids and all(everything.targets)


def test_what_precedes_an_answer_has_the_ids_that_a_server_will_see(encoder: TextEncoder):
    (encoded,) = encoder.chats([CHAT[:3]])
    asked = encoder.render(CHAT[:2], add_generation_prompt=True)
    prompt = encoder.tokenizer.encode(asked, add_special_tokens=False).ids
    assert encoded.ids[: len(prompt)] == prompt


def test_a_template_that_rewrites_earlier_turns_gives_each_answer_a_document_of_its_own(folder: Path, tmp_path: Path):
    # Thoughts are shown in the last turn only, as in templates of models that think.
    template = (
        "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' and loop.last %}[hm] {% endif %}{{ m.content }};"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    shutil.copytree(folder, tmp_path / "t")
    (tmp_path / "t" / "chat_template.jinja").write_text(template)
    encoder = TextEncoder(str(tmp_path / "t"))
    first, second = encoder.chats([CHAT])
    assert learned(encoder, first) == "[hm] A path.;"
    assert learned(encoder, second) == "[hm] Another naïve one.;"
    shown = encoder.tokenizer.decode(second.ids, skip_special_tokens=False)
    assert "<|assistant|>A path.;" in shown and shown.count("[hm]") == 1


TEMPLATES = {
    "generation": (
        "{%- for m in messages -%}[{{ m.role }}]{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}{%- endfor -%}{% if add_generation_prompt %}[assistant]{% endif %}"
    ),
    "loop controls": (
        "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.content }}|"
        "{% if m.role == 'assistant' %}{% break %}{% endif %}{% endfor %}"
    ),
    "json": "{{ messages | tojson(ensure_ascii=True, indent=2) }}{{ messages | tojson(sort_keys=True) }}",
}


@pytest.mark.parametrize("name", list(TEMPLATES))
def test_what_templates_use_is_rendered_as_transformers_does(folder: Path, tmp_path: Path, name: str):
    from transformers import AutoTokenizer

    shutil.copytree(folder, tmp_path / "t")
    (tmp_path / "t" / "chat_template.jinja").write_text(TEMPLATES[name])
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path / "t"), TextEncoder(str(tmp_path / "t"))
    for chat in (*CHATS, CHAT):
        text = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert ours.render(chat, add_generation_prompt=True) == text


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('roles must alternate') }}", "refuses a chat: roles must alternate"),
        ("{{ messages[0].nothing.more }}", "refuses a chat: .* has no attribute 'nothing'"),
        ("{% for m in messages %}", "cannot be used: "),
    ],
)
def test_a_template_that_cannot_render_a_chat_is_said(folder: Path, tmp_path: Path, template: str, said: str):
    shutil.copytree(folder, tmp_path / "t")
    (tmp_path / "t" / "chat_template.jinja").write_text(template)
    with pytest.raises(DataError, match=f"The chat template in .* {said}"):
        list(TextEncoder(str(tmp_path / "t")).pairs([("q", "a")]))
