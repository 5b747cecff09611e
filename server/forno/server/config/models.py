"""Settings of models and endpoints."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from forno.server.config.base import MAX_PIXELS, PixelCount, Rows, Settings
from forno.server.sharing import LEAST_WEIGHT

Pixels = Annotated[int, Field(strict=True, ge=1, le=32767)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class BatchingSettings(Settings):
    """How requests to one model are grouped."""

    enabled: bool | None = None
    """Whether rows of different requests run together; unset = found from the model and proven at warm-up."""
    tune: Literal["auto", "off"] = "auto"
    """`auto`: the rows of a run follow what runs are measured to cost; a value that is set below stays as it is.
    `off`: all of them stay."""
    max_rows: Rows = 32
    """Most rows of one run. Unset = 32 at most, and fewer where more rows make nothing faster."""
    max_delay_us: Annotated[int, Field(strict=True, ge=0, le=10_000_000)] = 0
    """Longest wait for company, in microseconds; 0 = a free engine never waits: requests group while it is
    busy. Unset = 0, but callers who were just answered and always ask again at once are waited for where that pays."""
    latency_target_ms: Annotated[int, Field(strict=True, ge=0, le=600_000)] = 0
    """Time from arrival to answer, in milliseconds, that batches are sized for while the engine keeps up; 0 = none:
    the rows that give the most answers a second. Refuses nothing: that is what a caller's deadline is for."""
    promote_after_ms: Annotated[int, Field(strict=True, ge=1, le=600_000)] = 1000
    """A request that has waited so long, in milliseconds, goes before every priority and every later deadline."""
    max_pending_rows: Rows = 4096
    """Most rows that may wait; a request over it is refused with RESOURCE_EXHAUSTED. A single larger request
    still enters an empty queue."""


class CacheSettings(Settings):
    """Answers that are kept, and given again to equal requests."""

    max_bytes: Annotated[int, Field(strict=True, ge=0, le=2**40)] = 0
    """Most memory of the kept answers of one version, in bytes; the least recently asked for make room.
    0 = no cache. Equal requests that come while the first of them waits or runs share its run."""
    ttl_s: Annotated[float, Field(strict=True, ge=0, le=365 * 86_400)] = 0.0
    """How long an answer may be given again, in seconds; 0 = as long as there is room for it."""


class PaddingSettings(Settings):
    """How requests of different row shapes run together. `padding: auto` stands for `padding: {enabled: auto}`."""

    enabled: bool | Literal["auto"] = False
    """Whether shorter rows are padded so that they run with longer ones; auto = only what is proven at warm-up to give
    the answers that rows give without padding. False = only rows of equal shapes run together."""
    sizes: tuple[Annotated[int, Field(strict=True, ge=1)], ...] = ()
    """Largest sizes of the buckets in which rows run together, such as [32, 64, 128]; empty = 8, 12, 16, 24, 32, 48
    and so on. A row above all of them runs with its equals."""
    exact: bool = False
    """Whether rows are padded up to their bucket's size, for engines that want few shapes; false = to the longest that
    run together."""
    axes: dict[str, tuple[int, ...]] = {}
    """Input -> its dimensions that are padded, such as {tokens: [1], mask: [1]}; empty = all of any size but the one of
    the rows, which is 0."""
    values: dict[str, bool | int | float | str] = {}
    """Input -> what it is padded with; 0 or an empty text where it is not named."""
    outputs: dict[str, dict[int, str]] = {}
    """Output -> dimension -> whose size it has, such as {scores: {1: tokens.1}}, so that padding is cut off again;
    where it is not named, dimensions that the model calls the same."""
    allowed_rows: tuple[Rows, ...] = ()
    """Counts of rows that a run may have, ascending, such as [1, 2, 4, 8]; smaller batches are padded by repeating
    their last row. Empty = any. It needs not `enabled`."""

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, given: object) -> object:
        if isinstance(given, str) and given not in {"auto", "true", "false"}:
            raise ValueError("auto, true, false or a mapping such as {enabled: auto, sizes: [32, 64]}")
        return {"enabled": given} if isinstance(given, str | bool) else given

    @field_validator("sizes", "allowed_rows")
    @classmethod
    def _ascending(cls, counts: tuple[int, ...]) -> tuple[int, ...]:
        if list(counts) != sorted(set(counts)):
            raise ValueError("numbers in ascending order, each once")
        return counts


class PreprocessSettings(Settings):
    """How images become what a model reads, on the device that it runs on.

    As soon as one of these is set, callers send uint8 [rows, height, width, channels] of any size.
    """

    tensor: str = ""
    """The model's input; empty = its only one."""
    layout: Literal["NCHW", "NHWC"] | None = None
    """Order of the input's dimensions; unset = from its shape."""
    resize: Pixels | tuple[Pixels, Pixels] | None = None
    """What images are resized to before the middle of the model's size is cropped: their shorter side, or height and
    width. Unset = the model's size, and nothing is cropped. Bilinear, antialiased."""
    mean: Number | tuple[Number, ...] = 0.0
    """What is subtracted from values of 0 to 1; one number, or one a channel."""
    std: Positive | tuple[Positive, ...] = 1.0
    """What the rest is divided by; one number, or one a channel."""
    max_pixels: PixelCount = MAX_PIXELS
    """Largest image that is taken, in pixels; a larger one is refused with INVALID_ARGUMENT. What the images of a batch
    took is kept for later ones, on the GPU and in host memory: up to `batching.max_rows` images of this size."""

    @property
    def is_set(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.model_fields_set)


class PostprocessSettings(Settings):
    """What is made of a model's scores on the device that it runs on, so that only that is copied back."""

    top_k: Annotated[int, Field(strict=True, ge=0, le=1000)] = 0
    """How many of the best classes of each row are answered instead of all scores: their scores in the output of the
    scores, and their numbers in another, called like it with `_classes` behind. 0 = all scores."""
    softmax: bool = False
    """Whether the scores are logits, which become probabilities."""
    tensor: str = ""
    """The output that scores the classes; empty = the only one."""


class OnnxSettings(Settings):
    """The ONNX Runtime engine."""

    intra_op_threads: Annotated[int, Field(strict=True, ge=0, le=1024)] = 0
    """Threads that share one run; 0 = all cores that the other `instances` leave, or 1 where the model is found to
    be small at warm-up."""
    spin: bool = False
    """Whether idle threads of the engine spin: lower latency, a core lost."""


class CudaSettings(Settings):
    """A GPU: what holds for a model whose `device` is one."""

    tf32: bool = True
    """Whether float32 products may be rounded to 10 bits of mantissa, which is several times faster."""
    precision: Literal["model", "fp16"] = "model"
    """In which types ONNX Runtime computes: those of the model, or float16, to which a float32 model is converted when
    it is loaded, but for its inputs and outputs, and for what squares, exponentiates or sums. Compare the answers with
    those of the model. TensorRT has a setting of its own: `tensorrt.precision`."""
    graphs: bool = False
    """Whether a run is captured once for each count of rows, and then started by one call instead of one a kernel: for
    models of many short kernels. Needs `padding.allowed_rows` and a model of fixed row shapes; `engine: tensorrt` needs
    neither, and captures what comes again."""
    conv_search: Literal["exhaustive", "heuristic"] = "exhaustive"
    """How ONNX Runtime chooses algorithms of convolutions: `exhaustive` tries them, again for each count of rows, so it
    belongs with `padding.allowed_rows`; `heuristic` looks them up."""
    channels_last: bool = False
    """Whether ONNX Runtime computes convolutions with channels last: faster in float16 on GPUs with tensor cores."""
    allow_cpu: bool = False
    """Whether a part of a model that has no CUDA kernel may run on the CPU, between copies; false = such a model is
    refused. What computes shapes may always run there."""
    memory_limit_bytes: Annotated[int, Field(strict=True, ge=0)] = 0
    """Most memory that the engine may take for what it computes with, in bytes; 0 = as much as there is."""
    shrink_memory: bool = False
    """Whether what a run took beyond the weights is given back after it: for models of which single requests are far
    larger than others. Costs time in every run. Not together with `graphs`."""
    slot_limit_bytes: Annotated[int, Field(strict=True, ge=0)] = 0
    """Most memory for inputs and outputs of batches, in bytes, on the GPU and again in host memory that it copies from;
    0 = as much as there is."""
    busy_wait: bool = False
    """Whether threads that wait for the GPU spin: some microseconds sooner, a core lost."""

    @model_validator(mode="after")
    def _graphs_keep_their_memory(self) -> CudaSettings:
        if self.graphs and self.shrink_memory:
            raise ValueError("`graphs` are tied to the memory that `shrink_memory` gives back; remove one of them")
        return self


Shape = tuple[Annotated[int, Field(strict=True, ge=0, le=2**31 - 1)], ...]


class TensorrtShapes(Settings):
    """Shapes of one input that a plan is built for, such as {min: [1, 16], opt: [16, 128], max: [32, 512]}."""

    min: Shape
    """The smallest."""
    opt: Shape
    """The shape that it is made fastest for."""
    max: Shape
    """The largest."""

    @model_validator(mode="after")
    def _in_order(self) -> TensorrtShapes:
        equally_long = len(self.min) == len(self.opt) == len(self.max)
        if not equally_long or any(
            not least <= best <= most for least, best, most in zip(self.min, self.opt, self.max, strict=True)
        ):
            raise ValueError(
                f"min {list(self.min)}, opt {list(self.opt)} and max {list(self.max)}: "
                "as many sizes in each, none above the next one's"
            )
        return self


class TensorrtSettings(Settings):
    """The TensorRT engine: how plans are built from ONNX models, and which are loaded."""

    profiles: tuple[dict[str, TensorrtShapes], ...] = ()
    """Ranges of shapes that a plan is built for, each input -> shapes, such as
    [{tokens: {min: [1, 16], opt: [16, 128], max: [32, 512]}}]; a run takes the one whose `opt` is nearest. Inputs of
    fixed shape need none. Empty = 1 to `batching.max_rows` rows, for models of which nothing else is open."""
    precision: Literal["model", "fp16", "bf16"] = "model"
    """In which types a plan computes: those of the model, or also float16, or, with TensorRT 10 alone, bfloat16.
    TensorRT 10 takes them where that is faster. For TensorRT 11, a model is converted to float16 but for its inputs and
    outputs, and for what squares, exponentiates or sums. Compare the answers with those of the model."""
    workspace_bytes: Annotated[int, Field(strict=True, ge=0)] = 0
    """Most memory of the GPU that a plan may be built to compute in, in bytes; 0 = as much as there is."""
    optimization_level: Annotated[int, Field(strict=True, ge=0, le=5)] = 3
    """How long the builder searches, from 0 (plans soon, slower runs) to 5."""
    version_compatible: bool = False
    """Whether plans are built to run on later releases of TensorRT too, and whether such plans are loaded: they hold
    code that runs on this machine, so load none that you do not trust."""
    refit: bool = False
    """Whether plans are built to take other weights. The next version of a model, the same but for its weights, then
    needs no build: it gets a kept plan with its own weights put in. What a plan gains by knowing weights is lost."""
    cache_dir: Path | None = None
    """Folder where plans that were built are kept, and what the builder has measured; unset = `forno/tensorrt` in the
    user's cache. Relative to the working directory."""
    cache_limit_bytes: Annotated[int, Field(strict=True, ge=0)] = 64 << 30
    """Most bytes of plans in that folder: after each new one, those that were unused for the longest time are removed.
    0 = no limit."""
    build_limit_s: Annotated[int, Field(strict=True, ge=1, le=7 * 86_400)] = 3600
    """Longest time that a build may take, in seconds; then it is ended, and the model cannot be loaded."""


class NullSettings(Settings):
    """The null engine: answers its inputs, after a delay. To test and to measure all but the model."""

    delay_us: Annotated[int, Field(strict=True, ge=0, le=60_000_000)] = 0
    """How long each run takes, in microseconds."""
    row_delay_us: Annotated[int, Field(strict=True, ge=0, le=60_000_000)] = 0
    """How much longer it takes for each of its rows, in microseconds."""
    shape: tuple[Annotated[int, Field(strict=True, ge=-1)], ...] = (-1, -1)
    """Shape of its one input `x` and one output `y`, -1 for any size; the first dimension counts rows."""
    data_type: str = "float32"
    """Element type of both."""


class ModelSettings(Settings):
    """One model: what `model.yaml` beside it holds, or an entry of `models` in forno.yaml."""

    path: Path | None = None
    """File, version folder or model folder, relative to the file that says so; unset in a `model.yaml`."""
    engine: Literal["onnx", "tensorrt", "null"] | None = None
    """What runs it; unset = found from the file. `tensorrt` runs plans, and builds one from an ONNX model."""
    versions: Annotated[int, Field(strict=True, ge=1)] | tuple[str, ...] = 1
    """How many of the newest versions are served, or exactly which."""
    labels: dict[str, str] = {}
    """Label -> version, such as {stable: "3"}; a label is a name that can move from version to version."""
    batching: BatchingSettings = BatchingSettings()
    """How its requests are grouped."""
    padding: PaddingSettings = PaddingSettings()
    """How requests of different row shapes run together; `auto` = where that is proven to change no answer."""
    preprocess: PreprocessSettings = PreprocessSettings()
    """How images become what it reads; nothing set = callers send what it reads."""
    postprocess: PostprocessSettings = PostprocessSettings()
    """What is made of its scores."""
    cache: CacheSettings = CacheSettings()
    """Answers that are given again to equal requests; off unless `max_bytes` is set."""
    deterministic: bool = True
    """Whether equal inputs give equal outputs; false for a model that samples, which is never cached."""
    device: str | None = None
    """Where it runs: `cpu`; `cuda` or `cuda:1`, an NVIDIA GPU by its number; `pycuda`, the same through PyCUDA. With
    `instances` above 1, batches are copied while others are computed. Unset = `cpu`, and `cuda` for TensorRT."""
    devices: tuple[Annotated[int, Field(strict=True, ge=0, le=255)], ...] = ()
    """Numbers of the GPUs that it runs on, such as [0, 1], where those are several: each has a copy of it, and
    `instances` of its own. `device` then says only through what: cuda or pycuda."""
    cuda: CudaSettings = CudaSettings()
    """Settings of the GPU."""
    onnx: OnnxSettings = OnnxSettings()
    """Settings of the ONNX Runtime engine."""
    tensorrt: TensorrtSettings = TensorrtSettings()
    """Settings of the TensorRT engine."""
    null: NullSettings = NullSettings()
    """Settings of the null engine."""
    inline_below_us: Annotated[int, Field(strict=True, ge=0, le=100_000)] = 150
    """A model whose full batch ran faster than this at warm-up, in microseconds, runs on the event loop
    itself, where a hop to a thread would cost more than the run; 0 = always on a thread of its own."""
    instances: Annotated[int, Field(strict=True, ge=1, le=64)] = 1
    """Most runs at once, each on a thread of its own; they share one copy of the model. More than one pays where a
    single run leaves cores idle. Above 1, it never runs on the event loop."""
    cpu_weight: Annotated[float, Field(strict=True, ge=LEAST_WEIGHT, le=1)] = 1.0
    """Its share of the processor while models compete for it, against models of weight 1: 0.25 = a quarter of the time
    that each of those gets; what nobody else wants it may use whole. Below 1, it never runs on the event loop."""

    @field_validator("device")
    @classmethod
    def _known(cls, device: str | None) -> str | None:
        if device is not None and not re.fullmatch(r"cpu|(cuda|pycuda)(:\d{1,3})?", device):
            raise ValueError("cpu, cuda or pycuda, the last two with a number where there are several, such as cuda:1")
        return device

    @model_validator(mode="after")
    def _one_place(self) -> ModelSettings:
        if (
            self.devices
            and self.device not in ("cuda", "pycuda")
            and not (self.device is None and self.engine == "tensorrt")
        ):
            raise ValueError(
                f"`devices` numbers GPUs, but `device` is {self.device or 'unset'}: set it to cuda or pycuda"
            )
        if len(set(self.devices)) < len(self.devices):
            raise ValueError(
                f"`devices` is {list(self.devices)}: each number once, and `instances` for more runs at once"
            )
        return self

    @property
    def runs_at_once(self) -> int:
        """Most runs at once, on all devices."""
        return self.instances * max(1, len(self.devices))

    @model_validator(mode="after")
    def _processed_or_padded(self) -> ModelSettings:
        if self.padding.enabled and (self.preprocess.is_set or self.postprocess.top_k):
            raise ValueError("`padding.enabled` goes together with neither `preprocess` nor `postprocess`; remove one")
        return self

    @model_validator(mode="after")
    def _graphs_of_known_rows(self) -> ModelSettings:
        if self.cuda.graphs and not self.padding.allowed_rows and self.engine != "tensorrt":
            raise ValueError("`cuda.graphs` needs `padding.allowed_rows`, such as [1, 2, 4, 8, 16]: one graph for each")
        return self

    @model_validator(mode="after")
    def _cached_only_if_deterministic(self) -> ModelSettings:
        if self.cache.max_bytes and not self.deterministic:
            raise ValueError(
                f"`cache.max_bytes` is {self.cache.max_bytes}, but `deterministic` is false: "
                "a cached answer would be given again; remove one of them"
            )
        return self


class EndpointSettings(Settings):
    """A named endpoint over a model: JSON-friendly values in and out."""

    model: str
    """The model that answers."""
    version: str = ""
    """The version that answers; empty = the default one. Not together with `label`."""
    label: str = ""
    """The label whose version answers."""
    input: dict[str, object] = {}
    """How the body becomes tensors: `codec` (`text`, `image`, `tensors`) and that codec's own settings."""
    output: dict[str, object] = {}
    """How tensors become the answer: `codec` (`label`, `tensors`) and that codec's own settings."""

    @model_validator(mode="after")
    def _one_selector(self) -> EndpointSettings:
        if self.version and self.label:
            raise ValueError(f"`version` {self.version} or `label` {self.label}, not both")
        return self
