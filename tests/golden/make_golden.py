"""Write the golden files that stand in for transformers where it is not installed.

    python -m tests.golden.make_golden          (needs torch and transformers)

One .npz a case of tests/parity_cases.py: the oracle's tokens and logits, and a hash of the weights they came from.
And demo_chats.npz: stories of the embedded model, with how clear each choice was.
"""

import hashlib
import tempfile
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from tests.model_files import write_tiny_model
from tests.parity_cases import CASES, ParityCase
from tinyvllm.demo import exam
from tinyvllm.loader.resolve import demo_model_folder
from tinyvllm.text.tokenizer import Tokenizer

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


def golden_demo_chats() -> list[dict[str, np.ndarray]]:
    """The stories of demo_chats.npz: "prompt", "tokens", "choices", "gaps", "best" of each."""
    data = np.load(FOLDER / "demo_chats.npz")
    assert str(data["weights"]) == weights_hash(demo_model_folder()), "another embedded model: run make_golden again"
    return [{name: data[f"{name}_{i}"] for name in ("prompt", "tokens", "choices", "gaps", "best")}
            for i in range(int(data["count"]))]


def write_demo_chats() -> None:
    from tests.hf_oracle import demo_chats

    folder = demo_model_folder()
    tokenizer = Tokenizer.from_folder(folder)
    exams = [*exam.grammar_pairs(6, seed=5), *exam.outside_words(6, seed=6)]
    chats = demo_chats(folder, [tokenizer.apply_chat_template(e.messages) for e in exams])
    arrays = {f"{name}_{i}": array for i, chat in enumerate(chats) for name, array in chat.items()}
    np.savez_compressed(FOLDER / "demo_chats.npz", count=len(chats), weights=weights_hash(folder), **arrays)


def main() -> None:
    from tests.hf_oracle import run_oracle

    write_demo_chats()

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
