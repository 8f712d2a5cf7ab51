"""Adapters trained with `autointerp.adapters`: on SAE latents or on the residual stream."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from autointerp.errors import InputError
from autointerp.evidence.adapters.base import ADAPTERS, View, local_folder, located
from autointerp.evidence.adapters.inserting import InsertingFormat

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

    from autointerp.evidence.hooked import Insertion

CONFIG, WEIGHTS = "sae_adapter.json", "sae_adapter.safetensors"


class SaeAdapterFormat(InsertingFormat):
    """`sae_adapter.json` and `sae_adapter.safetensors`."""

    name = "sae_adapter"
    on_latents = True

    def files(self, path: Path) -> list[Path]:
        return [path / CONFIG, path / WEIGHTS]

    def check(self, path: Path) -> None:
        from autointerp.evidence.weight_files import check_finite_file, check_header, read_json

        for file in self.files(path):
            if not file.is_file():
                raise InputError(f"adapter {path}: no {file.name}; save it again with autointerp.adapters.save")
        said = read_json(path / CONFIG, "adapter")
        if not isinstance(said.get("kind"), str) or not isinstance(said.get("hook"), str):
            raise InputError(f"adapter {path / CONFIG}: no kind or no hook; save it with autointerp.adapters.save")
        check_header(path / WEIGHTS, "adapter")
        check_finite_file(path / WEIGHTS, f"adapter {path}")

    def base_of(self, spec: str | Path) -> str | None:
        from autointerp.evidence.weight_files import read_json

        folder = local_folder(spec)
        return located(read_json(folder / CONFIG, "adapter").get("base"), folder)

    def insertions(self, folder: Path, config: PretrainedConfig, view: View, device: torch.device) -> list[Insertion]:
        from autointerp.adapters import files, load, load_dictionary
        from autointerp.evidence.hooked import Insertion
        from autointerp.evidence.hookpoints import resolve
        from autointerp.evidence.weight_files import read_json

        said = read_json(folder / CONFIG, "adapter")
        point, dictionary, width = resolve(said["hook"], config), view.dictionary, config.get_text_config().hidden_size
        if said["kind"] != "residual" and (dictionary is None or not files.fits(said, dictionary)):
            own = located(said.get("sae"), folder)
            dictionary = load_dictionary(own, str(device)) if own else dictionary
        adapter = load(folder, dictionary).to(device)
        if vars(adapter)["d"] != width:
            raise InputError(
                f"adapter {folder} acts on activations of width {vars(adapter)['d']}, the base model's residual width"
                f" is {width}: give --base its own"
            )
        return [Insertion(point, adapter)]


ADAPTERS.register("sae_adapter")(SaeAdapterFormat())
