"""Shell completion of jobs, config keys, config files and models in bash: `eval "$(igpt completion)"`.

The script lists all words itself, so that completing starts no Python.
"""

from collections.abc import Iterable

from igpt_jax.config import JOBS, MODELS, keys

# bash splits words at = and :, so the word before the cursor's `=` is the flag.
SCRIPT = """\
_igpt() {{
  local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} flag words
  [[ $word == = ]] && word= before="= "
  flag=${{COMP_WORDS[COMP_CWORD-1]}}
  [[ $before == "=" ]] && flag=${{COMP_WORDS[COMP_CWORD-2]}}
  COMPREPLY=()
  if ((COMP_CWORD == 1)); then
    words="{jobs} --help --version"
  elif [[ $before == "="* ]]; then
    case $flag in
      --config) words="{configs}" ;;
      --config.model.name) words="{models}" ;;
      *) mapfile -t COMPREPLY < <(compgen -f -- "$word"); return ;;
    esac
  else
    compopt -o nospace 2>/dev/null
    case ${{COMP_WORDS[1]}} in
{cases}
    esac
    words="--help --print_config --config= --workdir= $words"
  fi
  mapfile -t COMPREPLY < <(compgen -W "$words" -- "$word")
}}
complete -F _igpt igpt
"""


def script(configs: Iterable[str]) -> str:
    """The completion script; `configs` are the names of config files."""
    cases = [f"      {job}) words=\"{' '.join(f'--config.{name}=' for name, *_ in keys(job) if name != 'job')}\" ;;"
             for job in JOBS]
    return SCRIPT.format(jobs=" ".join(JOBS), configs=" ".join(configs), models=" ".join(MODELS),
                         cases="\n".join(cases))
