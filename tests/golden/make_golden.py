"""Write the golden files that stand in for transformers where it is not installed.

    python -m tests.golden.make_golden          (needs torch and transformers)

One .npz a case of tests/parity_cases.py: the oracle's tokens and logits, and a hash of the weights they came from.
"""

import hashlib
import tempfile
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from tests.model_files import write_tiny_model
from tests.parity_cases import CASES, ParityCase

FOLDER = Path(__file__).parent


def write_case(case: ParityCase, folder: Path) -> Path:
    """The model folder of a case."""
    return write_tiny_model(folder, dtype=case.dtype, shards=case.shards, seed=case.seed, **case.overrides)


def weights_hash(folder: Path) -> str:
    """Hash over the safetensors files, so that golden logits are never compared with another model's."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def main() -> None:
    from tests.hf_oracle import run_oracle

    for case in tqdm(CASES):
        with tempfile.TemporaryDirectory() as name:
            folder = write_case(case, Path(name) / "model")
            result = run_oracle(folder, case.prompt())
            # The bfloat16 logits fit into 16 bits exactly; the float32 ones are kept as they are.
            logits = (result["logits"].view(np.uint32) >> 16).astype(np.uint16)
            np.savez_compressed(FOLDER / f"{case.name}.npz", tokens=result["tokens"], logits=logits,
                                truth=result["truth"], weights=weights_hash(folder))


if __name__ == "__main__":
    main()
