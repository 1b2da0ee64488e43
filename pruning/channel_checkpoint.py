"""What a long pruning of channels has found so far, on disk, so that it goes on where it was stopped."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch import distributed as dist

from ellq.analysis import write_bytes, write_text
from ellq.theory.arguments import Indices

_DESCRIPTION = "ellq_channels.json"


class ChannelCheckpoint:
    """A folder with a file for every curve and every layer that is done; each is written whole or not at all.

    Every process of ``torch.distributed`` has a folder of its own in it.

    Args:
        folder: where; made if need be.
        fingerprint: of all that the result depends on.

    Raises:
        ValueError: the folder holds another pruning.
    """

    def __init__(self, folder: str | Path, fingerprint: str) -> None:
        rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        self._folder = Path(folder) / f"rank{rank}"
        description = self._folder / _DESCRIPTION
        if description.is_file():
            if json.loads(description.read_text(encoding="utf-8")) != fingerprint:
                raise ValueError(
                    f"checkpoint={str(folder)!r} holds another pruning: of other weights, inputs or arguments. Choose"
                    " another folder, or delete it."
                )
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        write_text(description, json.dumps(fingerprint))

    def read(self, stage: str, item: str) -> tuple[dict[str, Tensor], Any] | None:
        """Return the tensors and the JSON value that were written under a name; None where nothing was."""
        path = self._path(stage, item)
        if not path.is_file():
            return None
        content = path.read_bytes()
        try:
            tensors = safetensors.torch.load(content)
            header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
            return tensors, json.loads(header["__metadata__"]["value"])
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(f"{path} is damaged. Delete it; what it held will be computed again.") from error

    def write(self, stage: str, item: str, tensors: Mapping[str, Tensor], value: Any) -> None:
        """Write tensors and a JSON value under a name."""
        path = self._path(stage, item)
        path.parent.mkdir(parents=True, exist_ok=True)
        owned = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        write_bytes(path, safetensors.torch.save(owned, metadata={"value": json.dumps(value)}))

    def remove(self) -> None:
        """Delete it, once the pruning is done."""
        shutil.rmtree(self._folder, ignore_errors=True)
        if self._folder.parent.is_dir() and not any(self._folder.parent.iterdir()):
            self._folder.parent.rmdir()

    def _path(self, stage: str, item: str) -> Path:
        # Names of modules may be long, or the same but for case.
        return self._folder / stage / f"{hashlib.sha256(item.encode()).hexdigest()[:24]}.safetensors"


def fingerprint(model: nn.Module, batches: Sequence[Tensor], settings: Mapping[str, Any]) -> str:
    """Return a hash of a model's tensors, inputs and arguments."""
    found = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    state: Iterable[tuple[str, Any]] = model.state_dict().items()
    for name, tensor in (*state, *((f"batch {number}", batch) for number, batch in enumerate(batches))):
        if isinstance(tensor, Tensor):
            plain = tensor.detach().cpu().contiguous()
            found.update(f"{name} {plain.dtype} {tuple(plain.shape)}".encode())
            found.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def listed(kept: Mapping[str, Indices]) -> dict[str, list[int]]:
    """Return units as JSON."""
    return {name: own.tolist() for name, own in kept.items()}


def unlisted(kept: Mapping[str, list[int]]) -> dict[str, Indices]:
    """Return units from JSON."""
    return {name: np.array(own, dtype=np.intp) for name, own in kept.items()}
