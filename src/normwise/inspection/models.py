"""The model that a command line names: a factory, or a configuration of transformers."""

from __future__ import annotations

import importlib
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from normwise.inspection.narrowing import experts_of
from normwise.invariance.probe import place_of

__all__ = ["Configured", "batch_for", "called", "from_transformers", "load", "made_by", "one_line"]

_TOKENS, _IMAGE, _WAVE = 12, 64, 8000
_FEW_EXPERTS = 8
_HEADS = (
    "AutoModelForCausalLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForMaskedLM",
    "AutoModelForImageClassification",
)


def load(target: str) -> Any:
    """Return the object that ``package.module:name`` names; the working directory is searched too.

    Raises:
        ValueError: It cannot be imported, or there is no such name.
    """
    module_name, colon, name = target.partition(":")
    if not colon or not module_name or not name:
        raise ValueError(f"{target!r} names nothing: give package.module:name, as in models:resnet")
    if module_name.endswith(".py") or "/" in module_name or "\\" in module_name:  # before it is run
        module = re.split(r"[/\\]", module_name.removesuffix(".py"))[-1]
        raise ValueError(f"{module_name!r} is a path: go to its folder and give {f'{module}:{name}'!r}")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        value: Any = importlib.import_module(module_name)
        for part in name.split("."):
            value = getattr(value, part)
    except AttributeError as error:
        raise ValueError(f"{target!r}: {one_line(error)}; give a name that the module has") from error
    except (Exception, SystemExit) as error:
        raise ValueError(f"{module_name!r} cannot be imported: {one_line(error)}") from error
    return value


def made_by(target: str) -> nn.Module:
    """Return the model that ``package.module:factory`` makes: a function, a class or a model itself.

    Raises:
        ValueError: It cannot be found, raises, or makes no model.
    """
    factory = load(target)
    model = factory if isinstance(factory, nn.Module) else called(target, factory)
    if not isinstance(model, nn.Module):
        raise ValueError(f"{target!r} made a {type(model).__name__}, and a torch.nn.Module is needed")
    return model


def called(target: str, function: Any) -> Any:
    """Return ``function()``; whatever it raises becomes one line that names it.

    Raises:
        ValueError: It is not callable, or raises.
    """
    if not callable(function):
        raise ValueError(f"{target!r} is a {type(function).__name__}: give a function without arguments")
    try:
        return function()
    except (Exception, SystemExit) as error:
        raise ValueError(f"{target!r} raised {type(error).__name__}: {one_line(error)}") from error


@dataclass(frozen=True)
class Configured:
    """A configuration of transformers, and the class of its model."""

    name: str
    config: Any
    maker: Any

    def model(self, *, device: str = "cpu") -> nn.Module:
        """Return the model with random weights; on the device "meta", with none.

        Raises:
            ValueError: The model cannot be built.
        """

        def build() -> nn.Module:
            with torch.device(device):
                model = self.maker.from_config(self.config)
            if hasattr(model, "set_experts_implementation"):
                # Both run in float64. A loop over many experts is slow, copies of a few for each token too.
                few = experts_of(self.config) <= _FEW_EXPERTS
                model.set_experts_implementation("eager" if few else "batched_mm")
            return model  # type: ignore[no-any-return]

        return called(f"transformers {self.name}", build)  # type: ignore[no-any-return]


def from_transformers(name: str) -> Configured:
    """Return the configuration of a model of transformers.

    Args:
        name: A model type ("gpt2": its default configuration), a configuration file, or a name of the hub
            (which needs a network).

    Raises:
        ValueError: transformers is not installed, or the name is no configuration.
    """
    try:
        import transformers
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    except ImportError as error:
        raise ValueError("--transformers needs the extra 'hf': pip install normwise[hf]") from error
    try:
        if Path(name).is_file():
            config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
        elif name in CONFIG_MAPPING_NAMES:
            config = transformers.AutoConfig.for_model(name)
        else:
            config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:
        raise ValueError(
            f"--transformers {name!r} is no configuration ({one_line(error)}): give a model type such as "
            "gpt2, a config.json, or a name of the hub"
        ) from error
    if hasattr(config, "use_cache"):
        config.use_cache = False
    makers = [getattr(transformers, head) for head in _HEADS] + [transformers.AutoModel]
    maker = next((m for m in makers if type(config) in m._model_mapping), None)
    if maker is None:
        raise ValueError(f"--transformers {name!r}: no model class for {type(config).__name__}")
    return Configured(name, config, maker)


def batch_for(model: Any, config: Any) -> dict[str, Any]:
    """Return a random batch that a model of transformers runs on.

    Raises:
        ValueError: Its input is of a kind that is not known.
    """
    inputs = model.main_input_name
    text = getattr(config, "get_text_config", lambda: config)()
    tokens = _tokens(getattr(text, "vocab_size", None) or 2, getattr(text, "pad_token_id", None))
    batch: dict[str, Any]
    if inputs == "input_ids":
        batch = {inputs: tokens}
    elif inputs == "pixel_values":
        size = getattr(config, "image_size", None) or _IMAGE
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        batch = {inputs: torch.randn(4, getattr(config, "num_channels", 3), height, width)}
    elif inputs == "input_values":
        batch = {inputs: torch.randn(2, _WAVE)}
    elif inputs == "input_features" and hasattr(config, "num_mel_bins"):
        length = 2 * getattr(config, "max_source_positions", 50)
        batch = {inputs: torch.randn(2, config.num_mel_bins, length)}
    else:
        raise ValueError(f"the input {inputs!r} of {type(model).__name__} is not known: give --batches")
    if getattr(config, "is_encoder_decoder", False):
        batch["decoder_input_ids"] = tokens
    return batch


def _tokens(words: int, padding: int | None) -> torch.Tensor:
    """Return random tokens without the padding token.

    Its embedding is zero, so that the eps of a norm layer would be all of a variance.
    """
    tokens = torch.randint(0, words - 1, (2, _TOKENS))
    return tokens + (tokens >= (words - 1 if padding is None else padding))


def one_line(error: BaseException) -> str:
    """Return what an error says, in one line, and where in the user's code it was raised."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    if not isinstance(error, (ValueError, TypeError, RuntimeError, ImportError, AttributeError, SystemExit)):
        text = f"{type(error).__name__}: {text}" if text != type(error).__name__ else text
    return text + place_of(error)
