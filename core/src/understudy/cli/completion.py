"""``completion``."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

__all__ = ["completion"]


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script of SHELL.

    \b
    bash:  eval "$(understudy completion bash)"          in ~/.bashrc
    zsh:   eval "$(understudy completion zsh)"           in ~/.zshrc
    fish:  understudy completion fish | source           in ~/.config/fish/config.fish
    """  # noqa: D301 - click looks for the character, not for its spelling
    from understudy.cli.program import program  # noqa: PLC0415 - it imports this module by name

    kind = get_completion_class(shell)
    if kind is None:
        raise click.ClickException(f"{shell} is not supported by the installed click")
    click.echo(kind(program, {}, "understudy", "_UNDERSTUDY_COMPLETE").source())
