"""From a convolution layer's class to that of its served form and back, and how served layers are copied and pickled.

Two kinds of classes are made here: a subclass of the program's own class, whose methods run with the convolutions in
them served, and a class that torch.nn.utils.parametrize or the like has made for one layer, on another base.
"""

from __future__ import annotations

import copy
import copyreg
import functools
import types
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.utils import parametrize

from rocm_patch.fallback import Conv2dBypassConfig
from rocm_patch.overrides import bypassed
from rocm_patch.overrides.layer_dispatch import PATCHED, config_of

# From classes as programs know them to those of served layers, and back.
SERVED: dict[Any, Any] = {}
PLAIN: dict[Any, Any] = {}


def serving(native: Callable[..., Any]) -> Any:
    """A method of a layer that runs as it is, with the convolutions in it served as the layer's config says.

    TorchScript compiles the source behind `__wrapped__`, with the names of the function's module. Compiled code
    therefore calls aten's convolution, as the plain layer's does.
    """
    # Cells, under names that hide none of that module's.
    _rocm_patch_run, _rocm_patch_config_of, _rocm_patch_native = bypassed.run, config_of, native

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _rocm_patch_run(_rocm_patch_config_of(self), _rocm_patch_native, self, *args, **kwargs)

    names = getattr(native, "__globals__", globals())
    made = types.FunctionType(method.__code__, names, native.__name__, None, method.__closure__)
    return functools.update_wrapper(made, native)


class ServedLayer:
    """What all served layers have in common: how they are copied and pickled."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Served forms of a program's class are none of its own: its `__init_subclass__` is not told."""
        if cls.__dict__.get(PATCHED) is None:
            super().__init_subclass__(**kwargs)

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Programs replace single layers' `forward` and `_conv_forward`: the whole call is served."""
        return bypassed.run(config_of(self), super().__call__, *args, **kwargs)  # type: ignore[misc]

    def __copy__(self) -> Any:
        replica = object.__new__(type(self))
        replica.__dict__.update(self.__dict__)
        return replica

    def __deepcopy__(self, memo: Any) -> Any:
        kind: Any = type(self)
        native = getattr(super(), "__deepcopy__", None)
        if native is not None:
            replica = native(memo)
        elif _is_parametrized(kind):  # which has no state for pickle
            replica = _copied(self, memo)
        else:
            replica = copy._reconstruct(self, memo, *super().__reduce_ex__(4))  # type: ignore[attr-defined]
        if PATCHED in self.__dict__ and PATCHED not in replica.__dict__ and type(replica) is plain_class(kind):
            # The program's class makes its copies itself.
            replica.__class__ = kind
            replica.__dict__[PATCHED] = self.__dict__[PATCHED]
        return replica

    def __reduce_ex__(self, protocol: Any) -> Any:
        if PATCHED in self.__dict__:
            return _pickled_as_plain(self, protocol)
        return super().__reduce_ex__(protocol)


def _copied(layer: Any, memo: Any) -> Any:
    replica = object.__new__(type(layer))
    memo[id(layer)] = replica
    replica.__dict__.update(copy.deepcopy(layer.__dict__, memo))
    return replica


def _pickled_as_plain(layer: Any, protocol: Any) -> Any:
    """What a plain layer of the same content says to pickle, so that it loads where we are not."""
    twin = object.__new__(plain_class(type(layer)))
    twin.__dict__.update(layer.__dict__)
    forget(twin)
    reduced = twin.__reduce_ex__(protocol)
    if reduced[0] is copyreg.__newobj__ and len(reduced[1]) == 1:  # type: ignore[attr-defined]
        # pickle would insist on the layer's own class.
        make = copyreg._reconstructor  # type: ignore[attr-defined]
        return (make, (type(twin), object, None), *reduced[2:])
    return reduced


def _sent(layer: Any) -> Any:
    """What a layer on its way to a process of the same program says to multiprocessing: there it stays served."""
    if PATCHED not in layer.__dict__:
        return layer.__reduce_ex__(4)
    make, arguments, state, *more = _pickled_as_plain(layer, 4)
    if make is not copyreg._reconstructor or not isinstance(state, dict):  # type: ignore[attr-defined]
        return make, arguments, state, *more  # the program's class has its own way
    own = {name: layer.__dict__[name] for name in (PATCHED, "config") if name in layer.__dict__}
    return _arrived, arguments[:1], {**state, **own}


def _arrived(kind: type) -> Any:
    return object.__new__(served_class(kind))


def forget(layer: nn.Module) -> None:
    """Take out of a layer's attributes what patch_model() has put there."""
    del layer.__dict__[PATCHED]
    if isinstance(layer.__dict__.get("config"), Conv2dBypassConfig):
        del layer.__dict__["config"]


def is_served(kind: type) -> bool:
    """Whether the layers of a class are served ones."""
    return issubclass(kind, ServedLayer)


def served_class(kind: Any) -> Any:
    """The class of a layer's served form.

    Raises:
        TypeError: the class cannot have subclasses.
    """
    if kind not in SERVED:
        if _is_parametrized(kind):
            return _rebuilt(kind, (served_class(kind.__bases__[0]),))
        enter(kind, _subclass_of(kind))
    return SERVED[kind]


def enter(plain: Any, served: Any) -> None:
    """Name the class of a plain layer's served form."""
    SERVED[plain], PLAIN[served] = served, plain
    ForkingPickler.register(served, _sent)


def plain_class(kind: Any) -> Any:
    """The class that a served layer had; one that others have built on a served class is rebuilt on the plain one."""
    if kind in PLAIN:
        return PLAIN[kind]
    if not is_served(kind):
        return kind
    return _rebuilt(kind, tuple(map(plain_class, kind.__bases__)))


def _is_parametrized(kind: type) -> bool:
    """Whether torch.nn.utils.parametrize made this class for one layer, on top of its only base."""
    made_by = vars(kind).get("__getstate__")
    return kind.__name__.startswith("Parametrized") and getattr(made_by, "__module__", "") == parametrize.__name__


def _rebuilt(kind: type, bases: tuple[Any, ...]) -> Any:
    """A class with other bases: removing a parametrization, for one, goes back to the base."""
    body = {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")}
    name = kind.__name__
    for before, after in zip(kind.__bases__, bases, strict=True):
        name = name.replace(before.__name__, after.__name__)
    made = types.new_class(name, bases, {}, lambda namespace: namespace.update(body))
    if _is_parametrized(made) and not hasattr(made, "__deepcopy__"):
        made.__deepcopy__ = _copied  # type: ignore[attr-defined]
    return made


def _subclass_of(kind: Any) -> type:
    body: dict[str, Any] = {"__module__": kind.__module__, PATCHED: True}
    is_transposed = issubclass(kind, _ConvTransposeNd)
    if not is_transposed:
        body["_conv_forward"] = serving(kind._conv_forward)
    # torch.nn's forward of a plain convolution calls the other.
    if is_transposed or kind.forward.__module__ != _ConvTransposeNd.__module__:
        body["forward"] = serving(kind.forward)
    if getattr(kind, "cls_to_become", None) is not None:  # lazy
        body["cls_to_become"] = served_class(kind.cls_to_become)
    return types.new_class(f"Safe{kind.__name__}", (ServedLayer, kind), {}, lambda names: names.update(body))
