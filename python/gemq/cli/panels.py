"""Help of a command with many options: the dozen that most runs need, and the rest in panels by ``--help-all``."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperCommand

# of gemq quantize; what is in no panel is always shown
PANELS = {
    "Widths": ("attention_bits", "dense_bits", "shared_bits", "head_bits", "embedding_bits", "router_bits",
               "tensor_bits", "allocation", "candidates", "granularity", "group_size"),
    "Method": ("method", "constraints", "accounting", "perturbation", "estimate", "costs", "clip", "refine",
               "compensate", "rescale", "damping", "affinity", "tune_routers", "router_text", "router_method",
               "router_lr", "router_epochs", "router_batch"),
    "Run": ("batch_size", "dtype", "trust_remote_code", "check", "keep", "run_dir", "changed", "keep_run", "log",
            "form"),
    "Publish": ("upload_repo", "private"),
}
_PANEL_OF = {name: panel for panel, names in PANELS.items() for name in names}


class PanelledCommand(TyperCommand):
    """A command whose help shows :data:`PANELS` when it was asked for all, and says so otherwise."""

    params: list[Any]

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help; options in panels only after ``--help-all``."""
        whole = ctx.meta.get("gemq.help_all", False)
        before = self.epilog
        for parameter in self.params:
            panel = _PANEL_OF.get(parameter.name)
            if panel is not None:
                parameter.rich_help_panel, parameter.hidden = panel, not whole
        if not whole:
            names = ", ".join(panel.lower() for panel in PANELS)
            self.epilog = f"--help-all shows {len(_PANEL_OF)} more options: {names}."
        try:
            super().format_help(ctx, formatter)
        finally:
            self.epilog = before
            for parameter in self.params:
                if parameter.name in _PANEL_OF:
                    parameter.hidden = False


def _show_all(context: typer.Context, value: bool) -> None:
    if value and not context.resilient_parsing:
        context.meta["gemq.help_all"] = True
        print(context.get_help())
        raise typer.Exit()


HelpAll = Annotated[bool, typer.Option(
    "--help-all", callback=_show_all, is_eager=True, help="Show every option, in panels, and exit.")]
