"""Shell completion: commands and flags from here, groups and keys from Hydra's own completion of the step."""

from __future__ import annotations

from pocl_cli.errors import ConfigError

# Hydra takes the first word of COMP_LINE for the program, so the step is folded into it. Where '=' breaks words, bash
# wants only what comes after the last one.
_BASH = """\
_pocl_words() { COMPREPLY=( $(compgen -W "$1" -- "$word") ); }
_pocl() {
    local line=${COMP_LINE:0:COMP_POINT}
    local word=${line##* } step=${COMP_WORDS[1]} program=${COMP_WORDS[0]} choices
    COMPREPLY=()
    if [ "$COMP_CWORD" -eq 1 ]; then
        _pocl_words "score partition distill evaluate compare env --help --version --completion"
        return
    fi
    case $word in
        -*) _pocl_words "--help --cfg --info --multirun --config-dir --config-name --package --resolve"; return ;;
    esac
    case ${COMP_WORDS[COMP_CWORD-1]} in
        --config-dir|-cd) COMPREPLY=( $(compgen -d -- "$word") ); return ;;
        --cfg|-c) _pocl_words "job hydra all"; return ;;
        --info|-i) _pocl_words "all config defaults defaults-tree plugins searchpath"; return ;;
        --completion) _pocl_words "bash zsh"; return ;;
    esac
    case $step in score|partition|distill|evaluate|compare) ;; *) return ;; esac
    line="pocl ${line#*"$step"}"
    choices=$(COMP_LINE="$line" COMP_POINT=${#line} "$program" "$step" -sc query=bash 2>/dev/null)
    _pocl_words "$choices"
    case $COMP_WORDBREAKS in *=*) COMPREPLY=( "${COMPREPLY[@]#"${word%"${word##*=}"}"}" ) ;; esac
    case ${COMPREPLY[0]} in *[=./]) compopt -o nospace 2>/dev/null ;; esac
}
complete -o default -F _pocl pocl
"""
SCRIPTS = {"bash": _BASH, "zsh": "autoload -U +X bashcompinit && bashcompinit\n" + _BASH}


def script(shell: str) -> str:
    """The completion script of a shell, for `eval "$(pocl --completion bash)"`. Raises ConfigError for another."""
    if shell not in SCRIPTS:
        raise ConfigError(
            f"no completion for {shell!r}", why=f"known are {', '.join(SCRIPTS)}", fix="pocl --completion bash"
        )
    return SCRIPTS[shell]


def without_config_dirs(line: str) -> tuple[str, list[str]]:
    """A typed line without its --config-dir, which Hydra's completion does not look into, and the folders."""
    folders: list[str] = []
    kept: list[str] = []
    words = iter(line.split(" "))
    for word in words:
        name, equals, value = word.partition("=")
        if name in ("--config-dir", "-cd"):
            folders.append(value if equals else next(words, ""))
        else:
            kept.append(word)
    return " ".join(kept), folders
