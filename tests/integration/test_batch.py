"""Batch runs on real Ray: with vLLM where answers are the subject, with the echo engine where crashes are."""

from __future__ import annotations

import contextlib
import gzip
import json
import signal
import tarfile
import time
from io import BytesIO
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import ray.data
from commands import Running, started, tandem
from ray.data import DataContext
from serve_fixtures import PROMPTS, greedy_tokens, write_adapter, write_model
from small_folders import small_adapter, small_model

from tandem.batch.input.read import ChunkSource
from tandem.batch.prepare import prepare
from tandem.batch.run import READ_CPUS, _context, answer
from tandem.batch.work import WorkerContext
from tandem.cluster.local import LOOPBACK, LocalCluster
from tandem.cluster.marks import marked_processes
from tandem.config import BatchConfig
from tandem.errors import EngineError
from tandem.registry import Registry
from tandem.sdk.batch import run_batch

ECHO_ROWS = 60


def rows_in(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def published(output: Path) -> set[str]:
    return {p.name for p in (output / "run" / "pieces").glob("[!.]*-*.jsonl")}


def workers(cluster: LocalCluster) -> list[psutil.Process]:
    """Processes of a cluster that hold an engine of a batch run; other tests' runs may be on this machine too."""
    found = []
    for process in marked_processes(cluster.mark):
        with contextlib.suppress(psutil.Error):
            if "MapBatches(Worker)" in " ".join(process.cmdline()):
                found.append(process)
    return found


def echo_command(tmp_path: Path, home: Path) -> list[str]:
    """60 rows, four of them bad, in chunks of 4; each row takes an echo a third of a second."""
    home.mkdir(exist_ok=True)
    rows = [json.dumps({"custom_id": f"q{i}", "prompt": f"row {i} " + "word " * 8}) for i in range(ECHO_ROWS)]
    rows[7], rows[31] = "{bad", '{"question": 1}'
    rows[32], rows[59] = '{"prompt": "x", "model": "nobody"}', json.dumps({"prompt": "word " * 2000})
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    settings = ["engine=echo", "engine_args.delay_s=0.03", "rows_per_piece=4", "window_rows=8", "cpus_per_replica=0.5"]
    return [
        "batch", "run", "--input", str(tmp_path / "rows.jsonl"), "--model", "parrot", "--output", str(tmp_path / "out"),
        *(each for setting in settings for each in ("--set", setting)),
    ]  # fmt: skip


def check_whole(output: Path) -> None:
    """Every row once, in order, and the bad ones with their reasons."""
    results, errors = rows_in(output / "results.jsonl"), rows_in(output / "errors.jsonl")
    bad = [7, 31, 32, 59]
    assert [line["row"] for line in results] == [i for i in range(ECHO_ROWS) if i not in bad]
    assert [line["row"] for line in errors] == bad
    for line in results:
        assert line["custom_id"] == f"q{line['row']}"
        assert line["text"] == f"row {line['row']} " + " ".join(["word"] * 8)
    reasons = [line["error"]["message"] for line in errors]
    for reason, said in zip(reasons, ("not valid JSON", "It has question", "'nobody'", "2000 tokens"), strict=True):
        assert said in reason
    assert not published(output)


def python(*arguments: str) -> list[str]:
    import sys

    return [sys.executable, "-m", "tandem", *arguments]


@contextlib.contextmanager
def going(command: list[str], output: Path, home: Path, log: Path, cluster: LocalCluster, chunks: int) -> Any:
    """The command, once it has published so many chunks more than there were."""
    before = len(published(output))
    # As in a shell of its own, which knows of the cluster no more than the address.
    alone: dict[str, str | None] = dict.fromkeys(LOOPBACK)
    with started(python(*command), home=home, log=log, RAY_ADDRESS=cluster.address, **alone) as running:
        running.wait_for(lambda: len(published(output)) >= before + chunks, timeout_s=120)
        yield running


def killed(running: Running) -> None:
    running.process.kill()
    running.process.wait(30)


def test_a_run_whose_driver_and_worker_are_killed_has_every_row_once(cluster: LocalCluster, tmp_path: Path) -> None:
    home, output = tmp_path / "home", tmp_path / "out"
    command = echo_command(tmp_path, home)
    with going(command, output, home, tmp_path / "first.log", cluster, 2) as running:
        killed(running)
    kept = published(output)
    assert 2 <= len(kept) < 15 and not (output / "results.jsonl").exists()
    times = {name: (output / "run" / "pieces" / name).stat().st_mtime_ns for name in kept}
    with going(command, output, home, tmp_path / "second.log", cluster, 2) as running:
        assert f"of {ECHO_ROWS} rows are there already" in running.text()
        # What the killed driver had started is gone; this one's worker goes now.
        deadline = time.monotonic() + 30
        while len(found := workers(cluster)) > 1 and time.monotonic() < deadline:
            time.sleep(0.2)
        (worker,) = found
        worker.send_signal(signal.SIGKILL)
        for name, then in times.items():
            assert (output / "run" / "pieces" / name).stat().st_mtime_ns == then
        assert running.process.wait(120) == 3, running.text()
    assert "56 of 60 rows answered" in running.text() and "4 rows have no answer" in running.text()
    # Ray's C++ core tells on stderr that it restarts a worker.
    assert "core_worker.cc" not in running.text() and ".cc:" not in running.text()
    check_whole(output)
    # Done is done: nothing is started, and nothing is written.
    done = (output / "results.jsonl").stat().st_mtime_ns
    again = tandem(*command, home=home, RAY_ADDRESS="127.0.0.1:1")
    assert again.returncode == 3 and "56 of 60 rows answered, as before" in again.stdout
    assert (output / "results.jsonl").stat().st_mtime_ns == done


@pytest.mark.slow  # a worker is restarted until that is given up
def test_a_worker_that_cannot_stay_alive_ends_the_run_with_the_reason(cluster: LocalCluster, tmp_path: Path) -> None:
    home = tmp_path / "home"
    command = [*echo_command(tmp_path, home), "--set", "env.TANDEM_TEST=1", "--set", "max_failures=0"]
    with going(command, tmp_path / "out", home, tmp_path / "log", cluster, 1) as running:
        for worker in workers(cluster):
            worker.kill()
        assert running.process.wait(90) == 1
    said = running.text()
    assert "A replica of parrot died once; max_failures is 0. At last: it was killed" in said
    assert "the same command resumes" in said and "Traceback" not in said and "Deprecat" not in said


def test_a_model_that_cannot_be_loaded_ends_the_run_with_the_engines_words(
    ray_cluster: LocalCluster, tmp_path: Path, tandem_home: Path
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"architectures": ["NoSuchModel"], "model_type": "llama"}')
    config = BatchConfig(
        input=str(tmp_path / "rows.jsonl"), model=str(tmp_path / "model"), output=str(tmp_path / "out")
    )
    with pytest.raises(EngineError, match=r"^model cannot answer: .*NoSuchModel"):
        answer(prepare(config))


def test_rows_of_two_bases_and_their_adapters_are_answered_by_two_replicas_of_each(
    ray_cluster: LocalCluster, tmp_path: Path, tandem_home: Path
) -> None:
    registry = Registry.open()
    for name in ("one", "two"):
        registry.register_model(name, small_model(tmp_path / name, name))
        registry.register_adapter(f"{name}-red", small_adapter(tmp_path / f"{name}-red", name, rank=8), base=name)
    models = ["one", "two", "one-red", "two-red", None, "one-red@1", "three"]
    rows = [{"prompt": f"row {i}", **({"model": name} if name else {})} for i, name in enumerate(models * 6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = BatchConfig(
        input=str(tmp_path / "rows.jsonl"), model="two-red", output=str(tmp_path / "y.jsonl"), engine="echo", replicas=2,
        cpus_per_replica=0.5, rows_per_piece=5, resources_per_replica={"node:__internal_head__": 0.1},
    )  # fmt: skip
    run = prepare(config)
    assert run.survey.bases == ("one@1", "two@1")
    summary = answer(run)
    assert (summary.rows, summary.answered, summary.failed) == (42, 36, 6)
    results = rows_in(tmp_path / "y.jsonl")
    ids = ["one@1", "two@1", "one-red@1", "two-red@1", "two-red@1", "one-red@1", None]
    assert [(line["row"], line["response"]["body"]["model"], line["text"]) for line in results] == [
        (i, name, f"row {i}") for i, name in enumerate(ids * 6) if name
    ]
    assert [line["row"] for line in rows_in(tmp_path / "y.errors.jsonl")] == [6 + 7 * i for i in range(6)]


def test_replicas_that_take_every_cpu_and_more_still_get_rows(
    ray_cluster: LocalCluster, tmp_path: Path, tandem_home: Path
) -> None:
    rows = [{"prompt": f"row {i}"} for i in range(24)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    # 10 CPUs hold two of these, and nothing beside them.
    config = BatchConfig(
        input=str(tmp_path / "rows.jsonl"), model="echo", output=str(tmp_path / "out"), engine="echo", replicas=3,
        cpus_per_replica=5.0, rows_per_piece=2,
    )  # fmt: skip
    assert answer(prepare(config)).answered == 24


def test_one_task_reads_a_file_and_its_pieces_stay_apart_on_their_way_to_replicas(
    ray_cluster: LocalCluster, tmp_path: Path, tandem_home: Path
) -> None:
    rows = "".join(json.dumps({"prompt": f"row {i}"}) + "\n" for i in range(24))
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
    run = prepare(
        BatchConfig(
            input=str(tmp_path / "rows.jsonl.gz"), model="echo", output=str(tmp_path / "out"), engine="echo", rows_per_piece=2
        )
    )  # fmt: skip
    work = WorkerContext(
        spec=run.bases[0][0], served=run.bases[0][1], default=run.names.default, targets={}, request={},
        output=run.output, window_rows=4,
    )  # fmt: skip
    with DataContext.current(_context()):
        source = ChunkSource(run.survey.files, run.units, work)
        assert len(source.tasks) == 1
        read = ray.data.read_datasource(source, num_cpus=READ_CPUS, override_num_blocks=1)
        tables = [batch["unit"].tolist() for batch in read.iter_batches(batch_size=None, batch_format="numpy")]
    assert tables == [[unit.name] for unit in run.units] and len(tables) == 12


@ray.remote(num_cpus=0)
class Counter:
    """Something of the caller's that lives on its connection."""

    def __init__(self) -> None:
        self.count = 0

    def add(self) -> int:
        self.count += 1
        return self.count


def test_a_program_that_is_connected_to_a_cluster_runs_there_and_stays_connected(
    ray_cluster: LocalCluster, tmp_path: Path, tandem_home: Path
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "hey"}\n')
    counter = Counter.remote()
    assert ray.get(counter.add.remote()) == 1
    # This home knows of no cluster: another one would be started.
    done = run_batch(
        tmp_path / "rows.jsonl", model="echo", output=tmp_path / "out", engine="echo",
        resources_per_replica={"node:__internal_head__": 0.1}, cpus_per_replica=9.5,
    )  # fmt: skip
    assert done.answered == 1
    assert ray.get(counter.add.remote()) == 2


def write_inputs(folder: Path) -> list[tuple[str | None, str]]:
    """Three files of three sorts; of each row in order who is asked what."""
    folder.mkdir()
    mix = [(name, PROMPTS[i % 3]) for i, name in enumerate(["tiny", "red", None, "blue", "red@1", "blue"])]
    with (folder / "a.jsonl").open("w") as file:
        for name, prompt in mix:
            body = {"prompt": prompt, "max_tokens": 8, "temperature": 0, **({"model": name} if name else {})}
            file.write(json.dumps({"custom_id": "x", "method": "POST", "url": "/v1/completions", "body": body}) + "\n")
    table = pa.table({"prompt": [prompt for _, prompt in mix], "model": [name for name, _ in mix]})
    pq.write_table(table, folder / "b.parquet", row_group_size=2)
    with tarfile.open(folder / "c.tar", "w") as tar:
        for i, (name, prompt) in enumerate(mix):
            for extension, data in (("json", json.dumps({"model": name or "tiny"})), ("txt", prompt)):
                info = tarfile.TarInfo(f"s{i}.{extension}")
                info.size = len(data)
                tar.addfile(info, BytesIO(data.encode()))
    bad = [
        {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4},
        {"prompt": "the cat", "max_tokens": "many"},
        {"prompt": "the cat", "model": "green"},
        {"prompt": "the cat " * 3000},
        {"prompt": "the cat", "prompt_logprobs": 1},
        {"input": "the cat"},
    ]
    (folder / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in bad))
    return mix


def test_answers_are_those_of_hugging_face_whatever_the_format_and_the_adapter(
    ray_cluster: LocalCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TANDEM_HOME", str(tmp_path / "home"))
    base = write_model(tmp_path / "tiny")
    adapters: dict[str | None, Path] = {
        name: write_adapter(tmp_path / str(name), base, seed=i) for i, name in enumerate(("red", "blue"))
    }
    registry = Registry.open()
    registry.register_model("tiny", base)
    for name, folder in adapters.items():
        registry.register_adapter(str(name), folder, base="tiny")
    mix = write_inputs(tmp_path / "in")
    config = BatchConfig(
        input=str(tmp_path / "in"),
        model="tiny",
        output=str(tmp_path / "out"),
        request={"max_tokens": 8, "temperature": 0, "return_token_ids": True},
        rows_per_piece=4,
        engine_args={"max_model_len": 2048},
    )
    summary = answer(prepare(config))
    assert (summary.rows, summary.answered, summary.failed) == (24, 19, 5)
    expected = [greedy_tokens(base, adapters.get(name and name.partition("@")[0]), prompt, 8) for name, prompt in mix]
    results, errors = rows_in(tmp_path / "out" / "results.jsonl"), rows_in(tmp_path / "out" / "errors.jsonl")
    bodies = [line["response"]["body"] for line in results]
    assert [body["choices"][0]["token_ids"] for body in bodies[:18]] == expected * 3
    assert [line.get("text") for line in results[5:7]] == [None, bodies[6]["choices"][0]["text"]]
    assert [body["model"] for body in bodies[:6]] == ["tiny@1", "red@1", "tiny@1", "blue@1", "red@1", "blue@1"]
    assert [line["custom_id"] for line in results] == ["x"] * 6 + [f"row-{i}" for i in range(6, 12)] + [
        f"s{i}" for i in range(6)
    ] + ["row-18"]
    assert bodies[18]["object"] == "chat.completion" and results[18]["text"]
    reasons = {line["row"]: line["error"]["message"] for line in errors}
    assert list(reasons) == [19, 20, 21, 22, 23]
    for row, said in (
        (19, "max_tokens"),
        (20, "'green'"),
        (21, "2048"),
        (22, "logprobs of a prompt"),
        (23, "not answer /v1/embeddings"),
    ):
        assert said in reasons[row], reasons
    assert summary.tokens == sum(body["usage"]["completion_tokens"] for body in bodies)


@pytest.mark.slow  # two starts of vLLM for each victim
@pytest.mark.parametrize("victim", ["worker", "engine"])
def test_a_killed_vllm_is_started_again_and_answers_the_same(
    cluster: LocalCluster, tmp_path: Path, victim: str
) -> None:
    home, output = tmp_path / "home", tmp_path / "out"
    home.mkdir()
    base = write_model(tmp_path / "tiny")
    rows = [{"prompt": PROMPTS[i % 3], "max_tokens": 400, "ignore_eos": True, "temperature": 0} for i in range(96)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["batch", "run", "-i", str(tmp_path / "rows.jsonl"), "-m", str(base), "-o", str(output)]
    command += ["-s", "rows_per_piece=8", "-s", "window_rows=16", "-s", "engine_args.max_num_seqs=8"]
    with going(command, output, home, tmp_path / "first.log", cluster, 2) as running:
        killed(running)
    with going(command, output, home, tmp_path / "second.log", cluster, 2) as running:
        (worker,) = workers(cluster)
        if victim == "worker":
            worker.kill()
        else:
            engines = [p for p in worker.children(recursive=True) if "EngineCore" in " ".join(p.cmdline())]
            engines[0].kill()
        assert running.process.wait(200) == 0, running.text()
    results = rows_in(output / "results.jsonl")
    assert [line["row"] for line in results] == list(range(96))
    assert not rows_in(output / "errors.jsonl")
    # Greedy and in float32, the same prompt has the same answer before and after.
    for i, line in enumerate(results):
        assert line["text"] == results[i % 3]["text"]
