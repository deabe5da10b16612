"""What a model folder holds, and what it would take to run: the report behind `tinyvllm inspect`.

    report = inspect_model("path", block_size=16, memory=8 << 30)
    print(report.text())                          plain text
    rich.print(report)                            the same as tables

Only headers are read, so this is instant for a model of any size.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinyvllm.errors import ConfigError
from tinyvllm.loader.checkpoint import Checkpoint
from tinyvllm.loader.safetensors_file import TensorInfo
from tinyvllm.model.config import ModelConfig
from tinyvllm.units import format_bytes

_TENSOR_COLUMNS = ("tensor", "dtype", "shape", "bytes", "bytes of the file")


@dataclass(frozen=True)
class FileReport:
    """One safetensors file: bytes 0 to 8 the header's length, the header, from data_start on the tensors."""

    name: str
    size: int
    header_length: int
    data_start: int
    tensors: tuple[TensorInfo, ...]


@dataclass(frozen=True)
class MemoryEstimate:
    """How memory is shared between weights and KV cache. All sizes in bytes.

    weights: in memory, as bfloat16. memory: what there is for both, or None if unknown; then num_blocks is
    None too. num_blocks: whole KV-cache blocks that fit beside the weights (below 0: not even those fit).
    Activations are not counted: they depend on the batch, which the engine chooses.
    """

    weights: int
    kv_bytes_per_token: int
    kv_bytes_per_block: int
    block_size: int
    max_model_len: int
    memory: int | None
    num_blocks: int | None

    @property
    def num_tokens(self) -> int | None:
        """Tokens of context that fit, over all requests."""
        return None if self.num_blocks is None else max(0, self.num_blocks) * self.block_size

    @property
    def num_full_requests(self) -> float | None:
        """Requests of max_model_len tokens that fit at once."""
        return None if self.num_tokens is None else self.num_tokens / self.max_model_len


def estimate_memory(
    config: ModelConfig, block_size: int = 16, memory: int | None = None, max_model_len: int | None = None
) -> MemoryEstimate:
    """How memory would be shared. memory: bytes for weights and KV cache together. Raises ConfigError."""
    max_model_len = config.max_position_embeddings if max_model_len is None else max_model_len
    for name, value in (("block_size", block_size), ("max_model_len", max_model_len)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name} must be a whole number of 1 or more, got {value!r}")
    if memory is not None and memory < 0:
        raise ConfigError(f"memory must be a number of bytes, 0 or more, got {memory!r}")
    block_bytes = config.kv_bytes_per_block(block_size)
    return MemoryEstimate(
        weights=config.weight_bytes,
        kv_bytes_per_token=config.kv_bytes_per_token,
        kv_bytes_per_block=block_bytes,
        block_size=block_size,
        max_model_len=max_model_len,
        memory=memory,
        num_blocks=None if memory is None else (memory - config.weight_bytes) // block_bytes,
    )


@dataclass(frozen=True)
class ModelReport:
    """A model folder: its config, its files and tensors, and how memory would be shared."""

    folder: Path
    config: ModelConfig
    files: tuple[FileReport, ...]
    memory: MemoryEstimate

    @property
    def num_tensors(self) -> int:
        return sum(len(file.tensors) for file in self.files)

    @property
    def num_elements(self) -> int:
        return sum(tensor.num_elements for file in self.files for tensor in file.tensors)

    @property
    def tensor_bytes(self) -> int:
        return sum(tensor.nbytes for file in self.files for tensor in file.tensors)

    @property
    def dtypes(self) -> dict[str, int]:
        """{dtype: number of tensors}."""
        return dict(Counter(tensor.dtype for file in self.files for tensor in file.tensors))

    # ---- the report in three parts, as rows of text; `text` and rich lay the same rows out ----

    def config_rows(self) -> list[tuple[str, str]]:
        config = self.config
        groups = config.num_attention_heads // config.num_key_value_heads
        output = "the embedding itself (tied)" if config.tie_word_embeddings else "a matrix of its own"
        return [
            ("folder", str(self.folder)),
            ("architecture", config.architecture),
            ("parameters", f"{config.num_parameters:,}"),
            ("layers", str(config.num_hidden_layers)),
            ("hidden size", f"{config.hidden_size:,}"),
            ("feed-forward size", f"{config.intermediate_size:,}"),
            ("query heads", f"{config.num_attention_heads} of {config.head_dim} dimensions"),
            ("key/value heads", f"{config.num_key_value_heads} (each serves {groups} query heads)"),
            ("biases", _biases(config)),
            ("vocabulary", f"{config.vocab_size:,}"),
            ("output layer", output),
            ("context", f"{config.max_position_embeddings:,} tokens"),
            ("rotary embedding", _rope(config)),
            ("norm epsilon", f"{config.rms_norm_eps:g}"),
            (
                "begins with / ends with",
                f"{config.bos_token_id} / {', '.join(map(str, config.eos_token_ids))}",
            ),
        ]

    def tensor_rows(self, file: FileReport) -> Iterator[tuple[str, str, str, str, str]]:
        """(name, dtype, shape, bytes, byte range in the file) of each tensor, in the order of the data."""
        for tensor in file.tensors:
            shape = " x ".join(map(str, tensor.shape)) or "scalar"
            yield tensor.name, tensor.dtype, shape, f"{tensor.nbytes:,}", f"{tensor.begin:,} - {tensor.end:,}"

    def file_line(self, file: FileReport) -> str:
        return (
            f"{file.name}: {file.size:,} bytes = 8 (header length) + {file.header_length:,} (header) + "
            f"{file.size - file.data_start:,} (data of {len(file.tensors)} tensors)"
        )

    def memory_rows(self) -> list[tuple[str, str]]:
        estimate = self.memory
        counts = ", ".join(f"{count} {dtype}" for dtype, count in sorted(self.dtypes.items()))
        rows = [
            ("tensors", f"{self.num_tensors} ({counts}), {self.num_elements:,} values"),
            ("on disk", format_bytes(self.tensor_bytes)),
            ("weights in memory", f"{format_bytes(estimate.weights)} as bfloat16"),
            ("KV cache a token", format_bytes(estimate.kv_bytes_per_token)),
            (
                "KV cache a block",
                f"{format_bytes(estimate.kv_bytes_per_block)} ({estimate.block_size} tokens)",
            ),
            (
                "KV cache a full request",
                f"{format_bytes(estimate.kv_bytes_per_token * estimate.max_model_len)} "
                f"({estimate.max_model_len:,} tokens)",
            ),
        ]
        if estimate.memory is None:
            return rows
        rows.append(("memory", format_bytes(estimate.memory)))
        if estimate.num_blocks < 1:
            needed = format_bytes(estimate.weights + estimate.kv_bytes_per_block - estimate.memory)
            rows.append(("fits", f"no: weights and one block need {needed} more"))
        else:
            rows.append(("left for the KV cache", format_bytes(estimate.memory - estimate.weights)))
            rows.append(
                (
                    "fits",
                    f"{estimate.num_blocks:,} blocks = {estimate.num_tokens:,} tokens = "
                    f"{estimate.num_full_requests:.1f} requests of {estimate.max_model_len:,} tokens",
                )
            )
        return rows

    def text(self, tensors: bool = True) -> str:
        """The report as plain text. tensors: list every tensor."""
        parts = [_columns(self.config_rows())]
        for file in self.files:
            part = self.file_line(file)
            if tensors:
                part += "\n" + _columns([_TENSOR_COLUMNS, *self.tensor_rows(file)], right=(3, 4))
            parts.append(part)
        parts.append(_columns(self.memory_rows()))
        return "\n\n".join(parts)

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.table import Table

        def pairs(title: str, rows: list[tuple[str, str]]) -> Table:
            table = Table(title=title, title_justify="left", show_header=False, box=None, pad_edge=False)
            table.add_column(style="cyan")
            table.add_column()
            for row in rows:
                table.add_row(*row)
            return table

        parts: list[Any] = [pairs("Model", self.config_rows())]
        for file in self.files:
            table = Table(title=self.file_line(file), title_justify="left", box=None, pad_edge=False)
            for name in _TENSOR_COLUMNS:
                table.add_column(name, justify="right" if name.startswith("bytes") else "left")
            for row in self.tensor_rows(file):
                table.add_row(*row)
            parts.append(table)
        parts.append(pairs("Memory", self.memory_rows()))
        return Group(*(item for part in parts for item in (part, "")))


def inspect_model(
    folder: str | Path, block_size: int = 16, memory: int | None = None, max_model_len: int | None = None
) -> ModelReport:
    """Read a model folder's config and headers, and check that they belong together.

    memory: bytes for weights and KV cache together, for the estimate; max_model_len: the longest request, by
    default the model's own context. Raises what loading the model would raise.
    """
    config = ModelConfig.from_folder(folder)
    checkpoint = Checkpoint(folder, config)
    files = tuple(
        FileReport(file.path.name, file.size, file.header_length, file.data_start, tuple(file))
        for file in checkpoint.files
    )
    estimate = estimate_memory(config, block_size, memory, max_model_len)
    return ModelReport(Path(folder), config, files, estimate)


def _biases(config: ModelConfig) -> str:
    have = [
        name for name, on in (("attention", config.attention_bias), ("feed-forward", config.mlp_bias)) if on
    ]
    return ", ".join(have) or "none"


def _rope(config: ModelConfig) -> str:
    rope = config.rope
    text = f"theta {rope.theta:,g}, {rope.rope_type}"
    if rope.rope_type == "linear":
        text += f", factor {rope.factor:g}"
    if rope.rope_type == "llama3":
        text += (
            f", factor {rope.factor:g}, low {rope.low_freq_factor:g}, high {rope.high_freq_factor:g}, "
            f"original context {rope.original_max_position_embeddings:,}"
        )
    return text


def _columns(rows: list[tuple[str, ...]], right: tuple[int, ...] = ()) -> str:
    """Rows as aligned text; the columns in `right` are set to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = (
        "  ".join(
            f"{cell:>{width}}" if i in right else f"{cell:<{width}}"
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)
