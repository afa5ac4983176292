"""Layout rules: whether a model can be trained in a parallel layout, and the nearest layout in which it can. Pure.

Every rule that needs the model's shape is here, once: it is checked at submission, by the driver before a worker starts, and by
each worker with its model.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from tandem.config.training.job import TrainConfig
from tandem.config.training.model import ModelConfig
from tandem.errors import ConfigError, LayoutError

FAMILIES = ("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe")
"""`model_type`s whose layers training calls itself, which splitting a model requires; tests compare each with transformers' own
forward. Other families are trained unsplit, with that forward."""

STAGES_PER_RANK = {"gpipe": 1, "1f1b": 1, "interleaved": 2, "zero_bubble": 2}
"""Pipeline stages on each rank, by schedule."""

DEGREES = ("tensor", "pipeline", "expert", "context", "workers")

CHANGE_COST = {"parallel.workers": 1.5, "accumulate": 0.5, "batch_size": 0.5, "data.sequence_length": 0.5}
"""Cost of a change relative to that of a degree (1): the batch is easily changed, the number of machines is not."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """Shape of a model, as the rules need it; None is unknown, and no rule applies to it."""

    family: str | None = None
    """transformers' `model_type`."""
    layers: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    width: int | None = None
    """Inner width of an MLP; None if all layers are mixtures."""
    experts: int = 0
    """Experts of a layer; 0 for a dense model."""
    expert_width: int | None = None
    max_length: int | None = None
    window: int | None = None
    """Sliding window of attention in tokens; None for full attention."""

    @classmethod
    def of(cls, model: ModelConfig) -> ModelShape:
        """The shape of a new model."""
        return cls(
            family=model.architecture,
            layers=model.num_layers,
            heads=model.num_heads,
            kv_heads=model.num_kv_heads,
            width=None if model.num_experts else model.intermediate_size,
            experts=model.num_experts or 0,
            expert_width=model.moe_intermediate_size,
            max_length=model.max_length,
        )

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> ModelShape:
        """The shape in the values of a config.json or a transformers config."""

        def number(*keys: str) -> int | None:
            numbers = (values.get(key) for key in keys)
            return next((v for v in numbers if isinstance(v, int) and not isinstance(v, bool) and v > 0), None)

        family = values.get("model_type")
        experts = number("num_experts", "num_local_experts") or 0
        mixed = experts == 0 or bool(values.get("mlp_only_layers")) or values.get("decoder_sparse_step", 1) != 1
        # The window is off by default in Qwen's configs, and on in Mistral's and Mixtral's.
        windowed = values.get("use_sliding_window", family in ("mistral", "mixtral"))
        return cls(
            family=family if isinstance(family, str) else None,
            layers=number("num_hidden_layers"),
            heads=number("num_attention_heads"),
            kv_heads=number("num_key_value_heads", "num_attention_heads"),
            width=number("intermediate_size") if mixed else None,
            experts=experts,
            expert_width=number("moe_intermediate_size", "intermediate_size") if experts else None,
            max_length=number("max_position_embeddings"),
            window=number("sliding_window") if windowed else None,
        )


def check_layout(shape: ModelShape, config: TrainConfig) -> None:
    """Raise LayoutError if the model cannot be trained in the layout of `config`.

    The error states the fact, the numbers and the nearest settings that work.
    """
    fact = _problem(shape, config)
    if fact is None:
        return
    changes = nearest_layout(shape, config)
    works = ", ".join(f"{key}={value}" for key, value in changes.items())
    raise LayoutError(f"{fact} The nearest that works: {works or 'none with these numbers of workers'}.")


def nearest_layout(shape: ModelShape, config: TrainConfig) -> dict[str, int]:
    """The nearest layout that works, as new values of dotted config keys; empty if there is none.

    Degrees are only lowered; batch size, micro-batches and sequence length change as they require.
    """
    parallel = config.parallel
    max_degree = parallel.workers if layers_known(shape, config) else 1
    stages = [n for n in range(1, parallel.pipeline + 1) if n <= max_degree and _stages_fit(shape, config, n)]
    tensors = [
        n for n in range(1, parallel.tensor + 1) if n <= max_degree and _tensor_problem(shape, config, n) is None
    ]
    experts = [n for n in range(1, parallel.expert + 1) if n <= max_degree and _experts_fit(shape, n)]
    contexts = [
        n
        for n in range(1, min(max_degree, parallel.context) + 1)
        if parallel.context % n == 0 and _contexts_fit(config, n)
    ]
    best: tuple[float, dict[str, int]] = (math.inf, {})
    for tensor, pipeline, expert, context in itertools.product(tensors, stages, experts, contexts):
        group = tensor * pipeline * context
        for workers in {parallel.workers, parallel.data * group}:
            degrees = {"tensor": tensor, "pipeline": pipeline, "expert": expert, "context": context, "workers": workers}
            if workers % (group * parallel.replicate):
                continue
            cost, changes = _cost_and_changes(config, degrees, shape)
            if cost < best[0] and _is_valid_with(shape, config, changes):
                best = (cost, changes)
    return best[1]


def layers_known(shape: ModelShape, config: TrainConfig) -> bool:
    """Whether training calls the model's layers itself."""
    return _family_problem(shape, config) is None


def micro_batches_fit(schedule: str, stages: int, count: int) -> bool:
    """Whether torch's schedule can run `count` micro-batches through `stages` pipeline ranks."""
    match schedule:
        case "1f1b":
            return count >= stages
        case "interleaved":  # in rounds of about one micro-batch a rank, all of the same length
            return count % max(1, count // stages) == 0
        case _:
            return True


def length_unit(config: TrainConfig) -> int:
    """The sequence length must be a multiple of this."""
    parallel = config.parallel
    # A context-parallel rank takes two chunks of a sequence, which its tensor peers split evenly.
    chunks = 2 * parallel.context if parallel.context > 1 else 1
    sequence_degree = parallel.tensor if parallel.sequence_parallel else 1
    return math.lcm(chunks, parallel.context * sequence_degree)


def _problem(shape: ModelShape, config: TrainConfig) -> str | None:
    """The first rule that the layout violates, as a fact."""
    return next(_problems(shape, config), None)


def _problems(shape: ModelShape, config: TrainConfig) -> Iterator[str]:
    parallel = config.parallel
    if family_problem := _family_problem(shape, config):
        for key in ("tensor", "pipeline", "expert", "context"):
            if (degree := getattr(parallel, key)) > 1:
                yield f"parallel.{key} is {degree}, for which training goes through the layers itself, but {family_problem}."
    if not _experts_fit(shape, parallel.expert):
        if shape.experts == 0:
            yield f"parallel.expert is {parallel.expert}, but the model is dense: it has no experts to share."
        yield f"parallel.expert ({parallel.expert}) must divide the model's {shape.experts} experts."
    if problem := _tensor_problem(shape, config, parallel.tensor):
        yield f"parallel.tensor ({parallel.tensor}) {problem}."
    if parallel.pipeline > 1:
        if config.objective == "dpo":
            yield f"objective 'dpo' does not work across pipeline stages, and parallel.pipeline is {parallel.pipeline}."
        if config.lora is not None and config.lora.quantize:
            yield f"lora.quantize does not work across pipeline stages, and parallel.pipeline is {parallel.pipeline}."
        parts = STAGES_PER_RANK[parallel.schedule]
        if shape.layers and shape.layers % (parallel.pipeline * parts):
            parts_note = f" x {parts} parts a rank ({parallel.schedule})" if parts > 1 else ""
            yield (
                f"The model's {shape.layers} layers do not divide into the stages of parallel.pipeline="
                f"{parallel.pipeline}{parts_note}."
            )
        if not micro_batches_fit(parallel.schedule, parallel.pipeline, config.accumulate):
            needs = (
                f"at least as many micro-batches as stages ({parallel.pipeline})"
                if parallel.schedule == "1f1b"
                else f"micro-batches in whole rounds of {config.accumulate // max(1, config.accumulate // parallel.pipeline)}"
            )
            yield f"parallel.schedule {parallel.schedule!r} needs {needs}, and accumulate is {config.accumulate}."
    if not _contexts_fit(config, parallel.context):
        yield f"objective 'dpo' does not work on shared sequences, and parallel.context is {parallel.context}."
    length, unit = config.data.sequence_length, length_unit(config)
    if length % unit:
        divisors = "2 x parallel.context" if parallel.context > 1 else ""
        if parallel.tensor > 1 and parallel.sequence_parallel:
            divisors = "2 x parallel.context and parallel.context x parallel.tensor" if divisors else "parallel.tensor"
        yield f"data.sequence_length ({length}) must be a multiple of {unit}, for {divisors}."


def _family_problem(shape: ModelShape, config: TrainConfig) -> str | None:
    """The reason that training cannot call the model's layers itself; None if it can."""
    if shape.family is not None and shape.family not in FAMILIES:
        return f"it knows those of {', '.join(FAMILIES)}, and the model is a {shape.family!r}"
    if shape.window is not None and config.data.sequence_length > shape.window:
        return (
            f"the model's attention looks back {shape.window} tokens, less than data.sequence_length "
            f"({config.data.sequence_length})"
        )
    return None


def _tensor_problem(shape: ModelShape, config: TrainConfig, tensor: int) -> str | None:
    """The reason that a model cannot be split into `tensor` parts; None if it can."""
    for name, count in (
        ("key/value heads", shape.kv_heads),
        ("attention heads", shape.heads),
        ("columns of an MLP (intermediate_size)", shape.width),
        ("columns of an expert (moe_intermediate_size)", shape.expert_width),
    ):
        if count and count % tensor:
            return f"must divide the model's {count} {name}"
    if tensor > 1 and config.lora is not None and config.lora.quantize:
        return f"must be 1 with lora.quantize {config.lora.quantize!r}: packed weights cannot be cut"
    return None


def _stages_fit(shape: ModelShape, config: TrainConfig, stages: int) -> bool:
    if stages == 1:
        return True
    quantized = config.lora is not None and config.lora.quantize is not None
    divisible = not shape.layers or shape.layers % (stages * STAGES_PER_RANK[config.parallel.schedule]) == 0
    return divisible and config.objective != "dpo" and not quantized


def _experts_fit(shape: ModelShape, expert: int) -> bool:
    return expert == 1 or (shape.experts > 0 and shape.experts % expert == 0)


def _contexts_fit(config: TrainConfig, context: int) -> bool:
    return context == 1 or config.objective != "dpo"


def _cost_and_changes(
    config: TrainConfig, degrees: Mapping[str, int], shape: ModelShape
) -> tuple[float, dict[str, int]]:
    """Cost of changing `config` to the degrees `degrees`, and all values that change."""
    parallel = config.parallel
    current = {f"parallel.{key}": getattr(parallel, key) for key in DEGREES}
    current |= {
        "accumulate": config.accumulate,
        "batch_size": config.batch_size,
        "data.sequence_length": config.data.sequence_length,
    }
    changed = {f"parallel.{key}": degrees[key] for key in DEGREES}
    stages, tensor, context = degrees["pipeline"], degrees["tensor"], degrees["context"]
    changed["accumulate"] = config.accumulate
    if stages > 1:
        candidates = itertools.chain.from_iterable(
            (config.accumulate + n, config.accumulate - n) for n in itertools.count()
        )
        changed["accumulate"] = next(n for n in candidates if n > 0 and micro_batches_fit(parallel.schedule, stages, n))
    batch_unit = degrees["workers"] // (stages * tensor * context) * changed["accumulate"]
    changed["batch_size"] = _nearest_multiple(config.batch_size, batch_unit)
    reduced = replace(
        parallel, expert=1, replicate=1, pipeline=1, workers=tensor * context, tensor=tensor, context=context
    )
    unit = (
        length_unit(replace(config, parallel=reduced, batch_size=config.accumulate))
        if parallel.strategy != "ddp"
        else 1
    )
    limit = min(shape.max_length or math.inf, max(config.data.sequence_length, unit) + unit)
    length = min(_nearest_multiple(config.data.sequence_length, unit), int(limit) // unit * unit)
    changed["data.sequence_length"] = length if length >= 8 else -(-8 // unit) * unit
    changes = {key: value for key, value in changed.items() if value != current[key]}
    effort = sum(CHANGE_COST.get(key, 1.0) + abs(math.log2(value / current[key])) / 8 for key, value in changes.items())
    return effort, changes


def _is_valid_with(shape: ModelShape, config: TrainConfig, changes: Mapping[str, int]) -> bool:
    degrees: dict[str, Any] = {
        key.removeprefix("parallel."): value for key, value in changes.items() if key.startswith("parallel.")
    }
    try:
        candidate = replace(
            config,
            parallel=replace(config.parallel, **degrees),
            accumulate=changes.get("accumulate", config.accumulate),
            batch_size=changes.get("batch_size", config.batch_size),
            data=replace(config.data, sequence_length=changes.get("data.sequence_length", config.data.sequence_length)),
        )
    except (ConfigError, LayoutError):
        return False
    too_long = shape.max_length is not None and candidate.data.sequence_length > shape.max_length
    return not too_long and _problem(shape, candidate) is None


def _nearest_multiple(number: int, of: int) -> int:
    return max(1, round(number / of)) * of
