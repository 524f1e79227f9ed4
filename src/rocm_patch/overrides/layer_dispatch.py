"""How single layers are served: the configuration of each, and one dispatcher per way of being served."""

from __future__ import annotations

import os
from typing import Any

from torch import nn

from rocm_patch import settings
from rocm_patch.dispatch import Dispatcher
from rocm_patch.fallback import Conv2dBypassConfig, meaning
from rocm_patch.overrides import guarding
from rocm_patch.overrides.aten import ACTIVE
from rocm_patch.routes import Routes
from rocm_patch.trust.choose import Chooser

# Marks a layer that patch_model() has turned; the value is the configuration it was given, or None.
PATCHED = "_patched_by_rocm_patch"

# Shared by all layers that ask for the same.
_DISPATCHERS: dict[tuple[Any, ...], Dispatcher] = {}
_config = Conv2dBypassConfig()
_of_torch_nn: Conv2dBypassConfig | None = None


def get_config() -> Conv2dBypassConfig:
    """The configuration of layers that were given none."""
    return _config


def set_config(config: Conv2dBypassConfig) -> None:
    """Set the configuration of layers that were given none."""
    global _config
    _config = config


def set_config_of_torch_nn(config: Conv2dBypassConfig | None) -> None:
    """Set what patch_torch_nn() was given."""
    global _of_torch_nn
    _of_torch_nn = config


def config_of(layer: nn.Module) -> Conv2dBypassConfig:
    """A layer's own configuration, or that of patch_torch_nn(), or the general one."""
    own = getattr(layer, "config", None)
    if isinstance(own, Conv2dBypassConfig):  # a program's class may have a `config` of another kind
        return own
    return layer.__dict__.get(PATCHED) or _of_torch_nn or _config


def dispatchers() -> list[Dispatcher]:
    """The dispatchers that single layers have used."""
    return list(_DISPATCHERS.values())


def dispatcher_of(config: Conv2dBypassConfig) -> Dispatcher:
    """What serves the layers of a configuration."""
    workspace = os.environ.get(settings.variable("workspace"))
    key = (config.strategy, config.size_threshold, config.gpu_unfold_fallback, config.exact, workspace)
    found = _DISPATCHERS.get(key)
    if found is None:
        asked, chooser = settings.from_environ(), _chooser(config)
        guard = guarding.guard_for(chooser, asked)
        made = Dispatcher(Routes(chooser, guard, workspace=asked.workspace))
        found = _DISPATCHERS.setdefault(key, made)
    return found


def is_overridden(config: Conv2dBypassConfig, key: str | None = None) -> bool:
    """Whether the override serves all that aten gets just as the config says, on one device's key or on any."""
    if not ACTIVE:
        return False
    wanted = _chooser(config)
    return any(
        dispatcher.routes.chooser == wanted for name, dispatcher in ACTIVE.items() if key is None or name == key
    )


def _chooser(config: Conv2dBypassConfig) -> Chooser:
    policy, preferred, selective = meaning(config.strategy)
    policy = policy or "bypass"
    if policy == "guarded" and not config.gpu_unfold_fallback:
        policy = "native"
    return Chooser(policy, preferred, config.size_threshold if selective else None, exact=config.exact)
