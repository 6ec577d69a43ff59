"""The embedded model without its last layers: a real checkpoint and tokenizer that compile in a third of the time."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file, save_file

from easydel.assets import embedded_model_path


def write_shorter(folder: Path, layers: int) -> Path:
    """Write the first layers of the embedded model into a folder that is not there yet, and return it."""
    source = embedded_model_path()
    folder.mkdir()
    for file in source.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            (folder / file.name).symlink_to(file)
    config = json.loads((source / "config.json").read_text()) | {"num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(config))
    parts = {name: (name.split("."), tensor) for name, tensor in load_file(source / "model.safetensors").items()}
    kept = {name: tensor for name, (part, tensor) in parts.items() if "layers" not in part or int(part[2]) < layers}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    return folder
