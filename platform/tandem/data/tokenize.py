"""Tokenization: BPE training, chat templates, and loss masks.

Uses `tokenizers` and jinja2 directly: a task that only encodes must not wait for transformers to import. A test holds the
rendering equal to transformers' own.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from tandem.config import check
from tandem.errors import DataError
from tandem.ids import digest
from tandem.storage import disk_errors

BOS, EOS, PAD = "<|begin|>", "<|end|>", "<|pad|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
"""Each turn is its role's token, its text and the end token; an answer ends where the end token comes."""


class Generation(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}`, with which some templates mark what the assistant says: written as it is."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """The statements between the tags."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@dataclass(frozen=True, slots=True)
class Encoded:
    """One document: token ids, and for each whether it carries loss."""

    ids: list[int]
    targets: list[bool]


def train_tokenizer(texts: Iterable[str], folder: Path, *, vocab_size: int, max_length: int = 1_000_000) -> None:
    """Train a byte-level BPE on `texts` and write it to `folder` in Hugging Face's format, with a chat template.

    ConfigError for a `vocab_size` below the number of bytes and special tokens.
    """
    special, alphabet = [PAD, BOS, EOS, *ROLES], pre_tokenizers.ByteLevel.alphabet()
    check.at_least("vocab_size", vocab_size, len(special) + len(alphabet))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=special,
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    bos = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, bos)]
    )
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "additional_special_tokens": list(ROLES),
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
    }
    with disk_errors("writing the tokenizer", folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_text(tokenizer.to_str())
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1))


@lru_cache(maxsize=4)
def _read_tokenizer(path: str, changed_ns: int) -> Tokenizer:
    """Read once a process: a large vocabulary takes a second, and every task unpickles an encoder of its own."""
    return Tokenizer.from_file(path)


@dataclass(frozen=True)
class TextEncoder:
    """Encodes samples with the tokenizer in `folder`. Cheap to pickle: the tokenizer is read where it is used."""

    folder: str

    @cached_property
    def config(self) -> dict[str, Any]:
        """tokenizer_config.json."""
        path = Path(self.folder) / "tokenizer_config.json"
        try:
            config = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise DataError(
                f"{path} cannot be read: {error}. It must be a tokenizer in Hugging Face's format."
            ) from error
        template = Path(self.folder) / "chat_template.jinja"
        if template.exists():
            config["chat_template"] = template.read_text()
        return dict(config)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """tokenizer.json."""
        path = Path(self.folder) / "tokenizer.json"
        try:
            return _read_tokenizer(str(path), path.stat().st_mtime_ns)
        except Exception as error:  # tokenizers raises bare Exception
            raise DataError(f"{path} cannot be read: {error}. It must be a fast tokenizer (tokenizer.json).") from error

    def digest(self) -> str:
        """sha256 over the tokenizer and its chat template."""
        return digest([json.loads(self.tokenizer.to_str()), self.config.get("chat_template")])

    def token(self, name: str) -> str | None:
        """The text of `eos_token`, `bos_token` or `pad_token`."""
        value = self.config.get(name)
        return str(value["content"]) if isinstance(value, dict) else value

    def token_id(self, name: str) -> int | None:
        """The id of `eos_token`, `bos_token` or `pad_token`."""
        text = self.token(name)
        return None if text is None else self.tokenizer.token_to_id(text)

    @property
    def pad_id(self) -> int:
        """The id that fills rows: the pad token, or the end token, or 0."""
        pad, eos = self.token_id("pad_token"), self.token_id("eos_token")
        return pad if pad is not None else eos if eos is not None else 0

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return int(self.tokenizer.get_vocab_size())

    def render(self, messages: list[dict[str, str]], *, add_generation_prompt: bool = False) -> str:
        """The chat as text, by the tokenizer's chat template; DataError if the template refuses it."""
        special = {name: self.token(name) or "" for name in ("bos_token", "eos_token", "pad_token")}
        try:
            return str(self._template.render(messages=messages, add_generation_prompt=add_generation_prompt, **special))
        except (jinja2.TemplateError, TypeError) as error:
            raise DataError(f"The chat template in {self.folder} refuses a chat: {error}") from error

    def texts(self, texts: list[str]) -> Iterator[Encoded]:
        """Documents: begin token (where the tokenizer has one), text, end token; loss on all."""
        end = self.token_id("eos_token")
        for encoding in self.tokenizer.encode_batch(texts, add_special_tokens=True):
            ids = list(encoding.ids)
            if end is not None and (not ids or ids[-1] != end):
                ids.append(end)
            yield Encoded(ids, [True] * len(ids))

    def pairs(self, pairs: list[tuple[str, str]], *, loss_on_all: bool = False) -> Iterator[Encoded]:
        """Chats of one question and its answer; loss on the answer and its end token (or on all)."""
        turns = ([{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in pairs)
        return self.chats(list(turns), loss_on_all=loss_on_all)

    def chats(self, chats: list[list[dict[str, str]]], *, loss_on_all: bool = False) -> Iterator[Encoded]:
        """Chats of any turns; loss on what the assistant says, and the end token after it (or on all).

        What comes before an answer and the answer are encoded apart, so that the former's ids are those that a server will see.
        Where the template writes a turn differently once others follow, each answer is a document of its own, after the turns
        as the template writes them then. Raises DataError if even then an answer cannot be told from what it answers.
        """
        documents = [document for messages in chats for document in self._documents(messages)]
        pieces = [piece_text for document in documents for piece_text, _ in document]
        encoded = iter(self.tokenizer.encode_batch(pieces, add_special_tokens=False))
        for document in documents:
            ids, targets = list[int](), list[bool]()
            for _, is_answer in document:
                piece = next(encoded).ids
                ids += piece
                targets += [is_answer or loss_on_all] * len(piece)
            yield Encoded(ids, targets)

    def _documents(self, messages: list[dict[str, str]]) -> list[list[tuple[str, bool]]]:
        """A chat as documents of pieces, each with whether the assistant says it; what follows its last answer is left out."""
        turns = []
        for number, message in enumerate(messages):
            if message["role"] == "assistant":
                prompt, answer = self._turn(messages[:number], message["content"])
                turns.append((prompt, prompt + answer))
        if any(not following.startswith(previous) for (_, previous), (following, _) in itertools.pairwise(turns)):
            return [[(prompt, False), (prompt_and_answer[len(prompt) :], True)] for prompt, prompt_and_answer in turns]
        pieces, end = list[tuple[str, bool]](), 0
        for prompt, prompt_and_answer in turns:
            pieces += [(prompt[end:], False), (prompt_and_answer[len(prompt) :], True)]
            end = len(prompt_and_answer)
        return [pieces]

    def preferences(self, samples: list[tuple[list[dict[str, str]], str, str]]) -> Iterator[tuple[Encoded, Encoded]]:
        """Chats that end with the chosen and with the rejected answer; loss on these answers and their end tokens."""
        chosen = self._answers([(turns, answer) for turns, answer, _ in samples])
        rejected = self._answers([(turns, answer) for turns, _, answer in samples])
        return zip(chosen, rejected, strict=True)

    def _answers(self, samples: list[tuple[list[dict[str, str]], str]]) -> Iterator[Encoded]:
        """Chats with loss on their last answer only."""
        pieces = [piece for turns, answer in samples for piece in self._turn(turns, answer)]
        encodings = iter(self.tokenizer.encode_batch(pieces, add_special_tokens=False))
        for prompt in encodings:
            answer_ids = next(encodings).ids
            targets = [False] * len(prompt.ids) + [True] * len(answer_ids)
            yield Encoded([*prompt.ids, *answer_ids], targets)

    def _turn(self, turns: list[dict[str, str]], answer: str) -> tuple[str, str]:
        """What a chat is as text before an answer, and the answer with its end token; DataError if they cannot be told apart."""
        prompt = self.render(turns, add_generation_prompt=True)
        prompt_and_answer = self.render([*turns, {"role": "assistant", "content": answer}])
        if not prompt_and_answer.startswith(prompt):
            raise DataError(
                f"The chat template in {self.folder} writes the question differently once it is answered, so the answer's "
                "tokens cannot be told apart. Use another template, or data.loss_on=all with plain text."
            )
        return prompt, prompt_and_answer[len(prompt) :]

    @cached_property
    def _template(self) -> jinja2.Template:
        source = self.config.get("chat_template")
        if not isinstance(source, str):
            raise DataError(
                f"The tokenizer in {self.folder} has no chat template, which question-answer pairs need. "
                "Use a tokenizer that has one, or make the dataset of plain text."
            )
        # As transformers has it, but for strftime_now: training data must not depend on the date.
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json

        def refuse(message: str) -> None:
            raise jinja2.TemplateError(message)

        environment.globals["raise_exception"] = refuse
        try:
            return environment.from_string(source)
        except jinja2.TemplateError as error:
            raise DataError(f"The chat template in {self.folder} cannot be used: {error}") from error

    def __getstate__(self) -> dict[str, str]:
        return {"folder": self.folder}

    def __setstate__(self, state: dict[str, str]) -> None:
        self.__dict__.update(state)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
