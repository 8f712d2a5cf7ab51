"""SAELens dictionaries: loaded by sae_lens, so that every config it ever wrote is honoured, then encoded by our own
kernels where the architecture is known (standard, JumpReLU, gated, TopK) and by its own `encode` where it is not."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from autointerp.errors import InputError
from autointerp.evidence.dictionaries.base import DICTIONARIES, Dictionary, Source, check_finite
from autointerp.evidence.dictionaries.files import first_words
from autointerp.evidence.dictionaries.gemma_scope import hook_of_module
from autointerp.evidence.dictionaries.kernels import Generic, Linear, Normalisation, TopK, gated, jumprelu, relu
from autointerp.evidence.dictionaries.saelens_checkpoint import is_checkpoint, load_checkpoint
from autointerp.evidence.dictionaries.transcoder import reading_elsewhere
from autointerp.evidence.sae_spec import hook_in_config

if TYPE_CHECKING:
    from sae_lens import SAE

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"

_REFUSED = {"temporal": "its activations depend on other tokens"}


class SaeLensFolder:
    """A folder with `cfg.json` and `sae_weights.safetensors`, or one of the two."""

    says: tuple[str, ...] = ()

    def matches(self, path: Path) -> bool:
        if path.is_file():
            return path.name == WEIGHTS or (path.name == CONFIG and self.matches(path.parent))
        files = {file.name for file in path.iterdir()}
        return WEIGHTS in files or (CONFIG in files and not any(f.endswith((".safetensors", ".pt")) for f in files))

    def hook(self, source: Source) -> str | None:
        return hook_in_config(_folder(source.path) / CONFIG)

    def load(self, source: Source, device: str, dtype: torch.dtype) -> Dictionary:
        from sae_lens import SAE

        name, folder = source.name, _folder(source.path)
        config = _check_config(name, folder / CONFIG)
        _check_weights(name, folder / WEIGHTS)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if is_checkpoint(folder, config):
                    sae = load_checkpoint(folder, config, name, device, _name_of(dtype))
                else:
                    sae = SAE.load_from_disk(folder, device=device, dtype=_name_of(dtype))
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{name}: sae_lens cannot load it ({first_words(error)}); save it again") from error
        return from_sae(sae, name)


def _folder(path: Path) -> Path:
    return path if path.is_dir() else path.parent


DICTIONARIES.register("saelens")(SaeLensFolder())


def listed(spec: str) -> bool:
    """Whether SAELens' list has this `release/sae_id`."""
    release, _, sae_id = spec.partition("/")
    return bool(sae_id) and sae_id in _releases().get(release, {})


def listed_like(release: str, sae_id: str) -> list[str]:
    """Every `release/sae_id` of SAELens' list that contains both parts, each in its place."""
    return [f"{name}/{key}" for name, keys in _releases().items() if release in name for key in keys if sae_id in key]


def _releases() -> dict[str, dict[str, str]]:
    """The sae_ids by release; part of the library, nothing is fetched."""
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    return {name: release.saes_map for name, release in get_pretrained_saes_directory().items()}


def load_release(spec: str, device: str, dtype: torch.dtype) -> Dictionary:
    """The dictionary `release/sae_id` of SAELens' list, or `owner/name/sae_id` on the hub; InputError if not."""
    from sae_lens import SAE

    releases = _releases()
    release, _, sae_id = spec.partition("/")
    if release not in releases:
        owner, _, rest = spec.partition("/")
        repository, _, sae_id = rest.partition("/")
        release = f"{owner}/{repository}"
        if spec.startswith((".", "/", "~")) or not sae_id:
            raise InputError(
                f"SAE {spec}: no such folder, and no SAELens release of that name;"
                " give --sae a folder or release/sae_id"
            )
    elif sae_id not in releases[release]:
        some = ", ".join(list(releases[release])[:4])
        raise InputError(f"SAE {spec}: the release {release} has no {sae_id!r}; it has {some} …")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sae = SAE.from_pretrained(release, sae_id, device=device, dtype=_name_of(dtype))
    except OSError as error:  # huggingface_hub: offline, no such repository, no such file
        reason = f"{first_words(error)}; give a local folder, or go online"
        raise InputError(f"SAE {spec}: cannot be fetched from the hub ({reason})") from error
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"SAE {spec}: sae_lens cannot load it ({first_words(error)}); give another --sae") from error
    return from_sae(sae, f"SAE {spec}")


@torch.no_grad()
def from_sae(sae: SAE[Any], name: str = "SAE") -> Dictionary:
    """A dictionary with the weights of `sae`, which must not be used afterwards: they are taken over, folded in place.

    InputError for weights that are not finite or do not fit each other, and for architectures whose activations are not
    a function of one position of one hook.
    """
    architecture = sae.cfg.architecture()
    if architecture in _REFUSED:
        raise InputError(f"{name} is a {architecture}: {_REFUSED[architecture]}; give --sae an autoencoder of one hook")
    weights = {key: value.detach() for key, value in sae.state_dict().items()}
    _check_shapes(name, weights, sae.cfg.d_in, sae.cfg.d_sae, getattr(sae.cfg, "d_out", sae.cfg.d_in))
    check_finite(name, weights)
    metadata = sae.cfg.metadata
    if "transcoder" in architecture and not (metadata.hook_name and metadata.hook_name_out):
        raise InputError(f"{name}: {CONFIG} has no hook_name and hook_name_out: say in it where it reads and writes")
    if "transcoder" in architecture and Normalisation.named(sae.cfg.normalize_activations):
        raise InputError(f"{name}: a {architecture} that normalises each token is not read; give another --sae")
    dictionary = _KERNELS.get(architecture, _generic)(sae, weights)
    dictionary.format = f"saelens/{architecture}"
    dictionary.hook = metadata.hook_name_out if dictionary.hook_in else metadata.hook_name
    dictionary.prepend_bos = bool(metadata.prepend_bos)
    dictionary.context_size = metadata.context_size
    return dictionary


def _linear(sae: SAE[Any], weights: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {
        "W_enc": weights["W_enc"],
        "W_dec": weights["W_dec"],
        "b_dec": weights["b_dec"],
        "subtract_b_dec": bool(sae.cfg.apply_b_dec_to_input),
        "normalisation": Normalisation.named(sae.cfg.normalize_activations),
    }


def _standard(sae: SAE[Any], weights: dict[str, torch.Tensor]) -> Dictionary:
    return Linear(**_linear(sae, weights), b_enc=weights["b_enc"], activation=relu)


def _jumprelu(sae: SAE[Any], weights: dict[str, torch.Tensor]) -> Dictionary:
    # relu(pre) where pre > threshold: a threshold below 0 acts as 0.
    bar = weights["threshold"].clamp(min=0)
    common = _linear(sae, weights) | {"per_latent": {"threshold": bar}, "bar": bar}
    return Linear(**common, b_enc=weights["b_enc"], activation=jumprelu)


def _gated(sae: SAE[Any], weights: dict[str, torch.Tensor]) -> Dictionary:
    per_latent = {"scale": weights["r_mag"].exp(), "b_gate": weights["b_gate"], "b_mag": weights["b_mag"]}
    common = _linear(sae, weights) | {"per_latent": per_latent, "bar": -weights["b_gate"]}
    return Linear(**common, b_enc=None, activation=gated)


def _topk(sae: SAE[Any], weights: dict[str, torch.Tensor]) -> Dictionary:
    if sae.cfg.rescale_acts_by_decoder_norm:
        # Activations are multiplied by the decoder norms before the choice and divided by them in the decoder: the same
        # as an encoder with that factor in its columns and a decoder with rows of norm 1.
        norms = weights["W_dec"].norm(dim=1)
        weights["W_enc"].mul_(norms)
        weights["b_enc"].mul_(norms)
        weights["W_dec"].div_(norms.clamp_min(1e-8)[:, None])
    return TopK(**_linear(sae, weights), b_enc=weights["b_enc"], k=sae.cfg.k)


def _generic(sae: SAE[Any], weights: dict[str, torch.Tensor]) -> Dictionary:
    return Generic(sae, weights["W_dec"])


def _transcoder(sae: SAE[Any], weights: dict[str, torch.Tensor]) -> Dictionary:
    made = _jumprelu(sae, weights) if "threshold" in weights else _standard(sae, weights)
    assert isinstance(made, Linear)
    metadata = sae.cfg.metadata  # SAELens calls Gemma 3's `hook_mlp_in`, which is before the norm; HF's name is exact
    hook_in = hook_of_module(metadata.hf_hook_name) or metadata.hook_name
    return reading_elsewhere(made, hook_in, weights.get("W_skip"))


_KERNELS = {"standard": _standard, "jumprelu": _jumprelu, "gated": _gated, "topk": _topk}
_KERNELS |= dict.fromkeys(
    ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder"), _transcoder
)


def _check_config(name: str, path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise InputError(f"{name}: no {CONFIG} beside its weights; save it again or give another --sae") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{name}: {CONFIG} is not readable JSON ({first_words(error)}); save it again") from error
    missing = [key for key in ("d_in", "d_sae") if not isinstance(config, dict) or not isinstance(config.get(key), int)]
    if missing:
        raise InputError(f"{name}: {CONFIG} has no {' and no '.join(missing)}; give --sae a SAE that SAELens saved")
    return config


def _check_weights(name: str, path: Path) -> None:
    if not path.is_file():
        raise InputError(f"{name}: no {WEIGHTS} beside {CONFIG}; save it again or give another --sae")
    try:
        with safe_open(path, framework="pt") as file:
            keys = set(file.keys())
    except (SafetensorError, OSError) as error:
        raise InputError(f"{name}: {WEIGHTS} is corrupt ({first_words(error)}); copy or save it again") from error
    missing = sorted({"W_dec", "b_dec"} - keys)
    if missing:
        raise InputError(f"{name}: {WEIGHTS} lacks {', '.join(missing)}; save it again or give another --sae")


def _check_shapes(name: str, weights: dict[str, torch.Tensor], d_in: int, d_sae: int, d_out: int) -> None:
    wanted = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_out), "b_dec": (d_out,), "W_skip": (d_out, d_in)}
    wanted |= dict.fromkeys(("b_enc", "threshold", "b_gate", "b_mag", "r_mag"), (d_sae,))
    for key, shape in wanted.items():
        if key in weights and tuple(weights[key].shape) != shape:
            raise InputError(
                f"{name}: {key} has shape {list(weights[key].shape)}, its config (d_in {d_in}, d_sae {d_sae})"
                f" wants {list(shape)}; save it again"
            )


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
