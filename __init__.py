"""dcompile: compiles a trained diffusion model into a few static graphs and a table that says which runs at each step.

    import dcompile

    dcompile.compile("model", recipe=dcompile.Recipe(...), output="build")
    with dcompile.load("build") as session: ...

Each name is imported on first use, so `import dcompile` loads neither PyTorch nor an engine.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__all__ = ["Recipe", "__version__", "compile", "load"]

_HOME = {  # public name: (module, name there)
    "Recipe": (".compiler.recipe", "Recipe"),
    "compile": (".exporters.build", "compile_model"),
    "load": (".runtime", "load"),
    "__version__": (".runtime.version", "__version__"),
}

if TYPE_CHECKING:  # and no __getattr__: a type checker would take any name for an object
    from .compiler.recipe import Recipe
    from .exporters.build import compile_model as compile
    from .runtime import load
    from .runtime.version import __version__
else:

    def __getattr__(name: str) -> object:
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module, attribute = _HOME[name]
        value = getattr(import_module(module, __name__), attribute)
        globals()[name] = value  # the next access does not come here
        return value


def __dir__() -> list[str]:
    return sorted(__all__)
