"""Shell completion: the first word from our commands, the rest from Hydra's own completion of the step's configuration."""

from __future__ import annotations

from pocl_cli.errors import ConfigError

# Hydra reads the line from COMP_LINE and takes the first word for the program, so the step is folded into it.
_BASH = """\
_pocl() {
    local step=${COMP_WORDS[1]} word=${COMP_WORDS[COMP_CWORD]}
    if [ "$COMP_CWORD" -eq 1 ]; then
        COMPREPLY=( $(compgen -W "score partition distill evaluate env --help --version --completion" -- "$word") )
        return
    fi
    local line=${COMP_LINE#*"$step"}
    COMPREPLY=( $( COMP_LINE="pocl$line" COMP_POINT=$(( ${#line} + 4 )) "${COMP_WORDS[0]}" "$step" -sc query=bash 2>/dev/null ) )
    [[ ${COMPREPLY[0]} == *[=./] ]] && compopt -o nospace
}
COMP_WORDBREAKS=${COMP_WORDBREAKS//=}
complete -o nosort -o default -F _pocl pocl
"""
SCRIPTS = {"bash": _BASH, "zsh": "autoload -U +X bashcompinit && bashcompinit\n" + _BASH}


def script(shell: str) -> str:
    """The completion script of a shell: `eval "$(pocl --completion bash)"`."""
    if shell not in SCRIPTS:
        raise ConfigError(f"no completion for {shell!r}", why=f"known are {', '.join(SCRIPTS)}", fix="pocl --completion bash")
    return SCRIPTS[shell]
