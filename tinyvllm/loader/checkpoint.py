"""The weights of a model folder as one set of named tensors, in one file or in many.

    model.safetensors                                    everything in one file
    model.safetensors.index.json                         {"weight_map": {tensor name: file name}, ...}
    model-00001-of-00002.safetensors, ...                the files it names

`Checkpoint` finds and opens them; `check` compares the set of tensors with what the architecture expects,
both ways: a weight that is missing would be random, one that is left over means that the model is not what
config.json says.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from tinyvllm.errors import ModelFileError, ModelNotFoundError
from tinyvllm.loader.json_file import read_json_object, refuse_dangling_link
from tinyvllm.loader.safetensors_file import WEIGHT_DTYPES, SafetensorsFile, TensorInfo
from tinyvllm.model.config import ModelConfig
from tinyvllm.model.llama_weights import EMBED, IGNORED_TENSORS, LM_HEAD
from tinyvllm.model.registry import ARCHITECTURES

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_COMPARE_BYTES = 1 << 24  # at a time, when two tensors must be equal


class Checkpoint:
    """The open safetensors files of a folder. Raises ModelNotFoundError or ModelFileError.

    config: if given, the tensors are checked against it at once (see `check`).
    files: in the order of their names. tensors: {name: (file, TensorInfo)} over all of them.
    """

    def __init__(self, folder: str | Path, config: ModelConfig | None = None):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise ModelNotFoundError(f"{self.folder} is not a folder: give the folder that holds config.json")
        self.tensors: dict[str, tuple[SafetensorsFile, TensorInfo]] = {}
        for name in (SINGLE_FILE, INDEX_FILE):
            refuse_dangling_link(self.folder / name)
        if (self.folder / SINGLE_FILE).exists():
            self.files = [SafetensorsFile(self.folder / SINGLE_FILE)]
            self._add_tensors()
        elif (self.folder / INDEX_FILE).exists():
            weight_map = self._read_weight_map()
            self.files = self._open_shards(sorted(set(weight_map.values())))
            self._add_tensors()
            self._check_weight_map(weight_map)
        else:
            raise ModelNotFoundError(
                f"{self.folder} has neither {SINGLE_FILE} nor {INDEX_FILE}{self._hint_at_other_formats()}"
            )
        self._checked: ModelConfig | None = None
        if config is not None:
            self.check(config)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for _, info in self.tensors.values())

    def info(self, name: str) -> TensorInfo:
        """Shape, dtype and place of the tensor `name`. Raises ModelFileError if there is none."""
        return self._find(name)[1]

    def array(self, name: str) -> np.ndarray:
        """The tensor as a read-only view of its file, no copy: BF16 as uint16 bits, else as it is."""
        return self._find(name)[0].array(name)

    def release(self, name: str) -> None:
        """Let go of the memory behind a tensor that was read; reading it again brings it back."""
        self._find(name)[0].release(name)

    def check(self, config: ModelConfig) -> None:
        """Raise ModelFileError unless the tensors are exactly those of `config`, in shape and dtype too.

        Two kinds of extra tensors are let pass: a tied model's lm_head.weight that equals the embedding bit
        for bit, and rotary_emb.inv_freq buffers, which follow from config.json.
        """
        if config == self._checked:  # a tied copy of the output layer is compared byte by byte: once is enough
            return
        if config.num_hidden_layers > len(self.tensors):  # told before listing what millions of layers would need
            raise ModelFileError(
                f"{self.folder}: config.json says {config.num_hidden_layers} layers, but the checkpoint lacks most of "
                f"them: it holds {len(self.tensors)} tensors"
            )
        pieces = ARCHITECTURES[config.architecture].pieces(config)
        expected = {piece.name: piece.shape for piece in pieces}
        missing = [name for name in expected if name not in self.tensors]
        if missing:
            hint = ""
            if missing == [LM_HEAD]:
                hint = (
                    '. If its output layer is the embedding, config.json must say "tie_word_embeddings": true'
                )
            raise ModelFileError(f"{self.folder}: the checkpoint lacks {_listed(missing)}{hint}")
        extra = [
            name for name in self.tensors if name not in expected and not IGNORED_TENSORS.fullmatch(name)
        ]
        if config.tie_word_embeddings and LM_HEAD in extra:
            self._check_tied_copy()
            extra.remove(LM_HEAD)
        if extra:
            raise ModelFileError(
                f"{self.folder}: the checkpoint has {_listed(extra)} that {config.architecture} does not "
                "use, as config.json describes it"
            )
        for name, shape in expected.items():
            file, info = self.tensors[name]
            if info.shape != shape:
                raise ModelFileError(
                    f"{file.path}: tensor {name!r} has shape {list(info.shape)}, but config.json makes it "
                    f"{list(shape)}"
                )
            if info.dtype not in WEIGHT_DTYPES:
                raise ModelFileError(
                    f"{file.path}: tensor {name!r} has dtype {info.dtype}, which is not supported for "
                    f"weights (supported: {', '.join(WEIGHT_DTYPES)})"
                )
        self._checked = config

    # ---- details ----

    def _find(self, name: str) -> tuple[SafetensorsFile, TensorInfo]:
        if name not in self.tensors:
            raise ModelFileError(f"{self.folder}: the checkpoint has no tensor {name!r}")
        return self.tensors[name]

    def _add_tensors(self) -> None:
        for file in self.files:
            for info in file:
                if info.name in self.tensors:
                    raise ModelFileError(
                        f"{self.folder}: tensor {info.name!r} is in two files, "
                        f"{self._find(info.name)[0].path.name} and {file.path.name}"
                    )
                self.tensors[info.name] = (file, info)

    def _read_weight_map(self) -> dict[str, str]:
        path = self.folder / INDEX_FILE
        weight_map = read_json_object(path).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ModelFileError(f"{path} must have a 'weight_map' object {{tensor name: file name}}")
        for name, file_name in weight_map.items():
            # A name with a folder in it could point outside the model, so none may have one.
            if not isinstance(file_name, str) or Path(file_name).name != file_name or file_name in ("", ".."):
                raise ModelFileError(
                    f"{path}: weight_map puts {name!r} into {file_name!r}, which is not the plain name of a "
                    "file"
                )
        return weight_map

    def _open_shards(self, names: list[str]) -> list[SafetensorsFile]:
        missing = [name for name in names if not (self.folder / name).exists()]
        if missing:
            raise ModelNotFoundError(
                f"{self.folder}: {len(missing)} of the {len(names)} files that {INDEX_FILE} names are "
                f"missing: {', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}. Download them"
            )
        return [SafetensorsFile(self.folder / name) for name in names]

    def _check_weight_map(self, weight_map: dict[str, str]) -> None:
        for name, file_name in weight_map.items():
            if name not in self.tensors:
                raise ModelFileError(
                    f"{self.folder}: {INDEX_FILE} says that {file_name} holds {name!r}, but no file does"
                )
            actual = self.tensors[name][0].path.name
            if actual != file_name:
                raise ModelFileError(
                    f"{self.folder}: {INDEX_FILE} says that {file_name} holds {name!r}, but it is in {actual}"
                )
        unlisted = [name for name in self.tensors if name not in weight_map]
        if unlisted:
            raise ModelFileError(
                f"{self.folder}: the files hold {_listed(unlisted)} that {INDEX_FILE} does not list"
            )

    def _check_tied_copy(self) -> None:
        (head_file, head), (_, embed) = self.tensors[LM_HEAD], self.tensors[EMBED]
        same = (head.shape, head.dtype) == (embed.shape, embed.dtype)
        if not (same and _equal_bits(self.array(LM_HEAD), self.array(EMBED))):
            raise ModelFileError(
                f'{head_file.path}: config.json says "tie_word_embeddings": true, but {LM_HEAD} differs from '
                f"{EMBED}. If the model has an output layer of its own, config.json must say false"
            )

    def _hint_at_other_formats(self) -> str:
        other = sorted(
            path.name
            for pattern in ("pytorch_model*.bin", "*.pth", "*.gguf", "*.safetensors")
            for path in self.folder.glob(pattern)
        )
        if not other:
            return ": these hold a model's weights"
        return (
            f". It has {', '.join(other[:3])}, but only weights under those names are read: save them as "
            "safetensors"
        )


def _equal_bits(a: np.ndarray, b: np.ndarray) -> bool:
    a, b = a.reshape(-1).view(np.uint8), b.reshape(-1).view(np.uint8)
    return all(
        np.array_equal(a[i : i + _COMPARE_BYTES], b[i : i + _COMPARE_BYTES])
        for i in range(0, len(a), _COMPARE_BYTES)
    )


def _listed(names: Iterable[str]) -> str:
    """'the tensor x', or '12 tensors: x, y, z, ...'."""
    names = list(names)
    if len(names) == 1:
        return f"the tensor {names[0]!r}"
    shown = ", ".join(map(repr, names[:4]))
    return f"{len(names)} tensors ({shown}{', ...' if len(names) > 4 else ''})"
