"""What a word of a command line that is no setting was meant to be: "did you mean layer=21?"."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from functools import cached_property
from os.path import exists
from typing import NamedTuple

from residual_saes.conf import schema
from residual_saes.conf.names import is_path
from residual_saes.data.site import RESID_POST, point_elsewhere

# Options that are Hydra's, and those of them that the next word belongs to.
_WITH_WORD = {
    *("--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn"),
    *("--config-dir", "-cd", "--experimental-rerun", "--info", "-i"),
}
_ALONE = {
    *("--help", "-h", "--hydra-help", "--version", "--resolve"),
    *("--multirun", "-m", "--shell-completion", "-sc"),
}
COMMANDS = ("harvest", "train", "analyze", "export", "publish")
# What a path without a name is, in the order of COMMANDS.
_OF_PATHS = dict(zip(COMMANDS, ("text.path", "store", "run", "run", "run"), strict=True))
# Names that other programs have for our settings.
_ELSEWHERE = {
    "batch": "batch_size train_batch_size train_batch_size_tokens bs",
    "checkpoint_every": "n_checkpoints save_every save_steps checkpoint_interval",
    "context": "context_size context_length ctx ctx_len seq_len max_length max_seq_len",
    "device": "gpu cuda",
    "layer": "hook_layer layers",
    "log": "wandb wandb_project use_wandb log_to_wandb report_to",
    "model.dtype": "torch_dtype precision",
    "model.path": "model_name model_id pretrained hf_model",
    "optim.lr": "learning_rate",
    "optim.warmup_steps": "warmup lr_warmup_steps lr_warm_up_steps",
    "out": "output output_dir out_dir output_path",
    "repo": "repo_id hub_model_id",
    "run": "sae sae_path run_name save_dir checkpoint_path out output output_dir out_dir",
    "sae": "architecture arch sae_type",
    "sae.d_sae": "dict_size n_latents num_latents width n_features d_hidden expansion_factor",
    "sae.dead_after": "dead_feature_window dead_feature_threshold dead_steps_threshold",
    "sae.k": "topk l0 l1 l1_coefficient l1_coeff l1_penalty l0_coefficient sparsity",
    "site": "hook_name hook_point hookpoint hookpoints hook",
    "store": "activations activation_path cached_activations_path output output_dir out_dir",
    "study": "eval metric",
    "text.path": "dataset dataset_path dataset_name data corpus file texts",
    "to": "format library target",
    "tokens": "n_tokens num_tokens training_tokens total_training_tokens max_tokens steps epochs",
}
# Names whose values are no values of ours.
_OTHER_UNIT = re.compile(
    "steps|epochs|expansion_factor|l[01]_.*|l1|sparsity|.*wandb.*|dead_.*|n_checkpoints"
)
_HOOK = "a layer is given by its number"
_THOUSANDS = re.compile(r"\d{1,3}(,\d{3})+")
_PATH = re.compile(r"/|\.(zarr|txt|jsonl?|parquet|pt|gz|zst)$")


class Mistake(NamedTuple):
    """Words that are no setting."""

    words: int  # how many
    reason: str
    meant: str | None  # NAME=VALUE; None: nothing is near


def foreign_options(command: str, words: Sequence[str]) -> str | None:
    """What to say of options that Hydra does not have; None: there are none.

    Hydra's parser would end the process. A layer in another program's words it would take.
    """
    mistakes = dict(_mistakes(command, words))
    for start, mistake in mistakes.items():
        if words[start].startswith("-") or mistake.reason == _HOOK:
            return _line(command, words, mistakes)
    return None


def advice(command: str, words: Sequence[str]) -> str | None:
    """What to say of a command line that Hydra has refused; None: all words look right."""
    mistakes = dict(_mistakes(command, words))
    return _line(command, words, mistakes) if mistakes else None


def _line(command: str, words: Sequence[str], mistakes: Mapping[int, Mistake]) -> str:
    """The first mistake, and what was meant: a setting, or the whole line if several are wrong."""
    start, first = next(iter(mistakes.items()))
    typed = _short(" ".join(words[start : start + first.words]))
    if first.meant is None:
        return f"{typed}: {first.reason}"
    meant = first.meant
    if len(mistakes) > 1 and all(mistake.meant for mistake in mistakes.values()):
        meant = f"`python -m {module_of(command)} {shlex.join(_corrected(words, mistakes))}`"
    elif is_path(meant.partition("=")[0]) and exists(meant.partition("=")[2]):
        meant = shlex.quote(meant)  # as it must be typed
    return f"{typed}: {first.reason}; did you mean {_short(meant, 400)}?"


def module_of(command: str) -> str:
    """What stands behind `python -m`."""
    return f"train.{command}" if command in ("export", "publish") else command


def _corrected(words: Sequence[str], mistakes: Mapping[int, Mistake]) -> Iterator[str]:
    number = 0
    while number < len(words):
        mistake = mistakes.get(number)
        if mistake and mistake.reason == _HOOK:
            yield from str(mistake.meant).split()
        else:
            yield (mistake and mistake.meant) or words[number]
        number += mistake.words if mistake else 1


def _short(text: str, most: int = 80) -> str:
    return text if len(text) <= most else f"{text[:most]}..."


def _mistakes(command: str, words: Sequence[str]) -> Iterator[tuple[int, Mistake]]:
    """The words that are no setting of the command, by the number of the first."""
    known = _Known(command, words)
    number = 0
    while number < len(words):
        word = words[number]
        if word in _WITH_WORD or word in _ALONE:
            number += 2 if word in _WITH_WORD else 1
            continue
        if word in ("--run", "-r") and "run" not in known.settings:
            number += 1  # Hydra's
            continue
        mistake = known.mistake(words[number:])
        if mistake:
            yield number, mistake
        number += mistake.words if mistake else 1


class _Known:
    """The settings that a command line could have."""

    def __init__(self, command: str, words: Sequence[str]) -> None:
        self.command = command
        self.settings = schema.everywhere(command)
        self.groups = schema.groups(schema.command_file(command))
        typed = dict(word.split("=", 1) for word in words if "=" in word)
        self.chosen = {group: typed.get(group, name) for group, name in self.groups.items()}
        self.lists_all = f"`python -m {module_of(command)} --help` lists all"

    def mistake(self, words: Sequence[str]) -> Mistake | None:
        """What is wrong with the first word, of which the next ones may be the value."""
        word = words[0]
        following = words[1:2] if words[1:] and not words[1].startswith("-") else []
        following = [value for value in following if "=" not in value]
        key, sign, value = word.partition("=")
        if word.startswith("-"):
            return self._option(word, following)
        if key.startswith(("+", "~", "hydra")) or (sign and "@" in key):
            return None  # what Hydra alone knows
        if sign and key and not (value == "" and following):
            return _unquoted(words) or self._hook(key, value) or self._setting(key, value)
        return self._bare(words, following)

    def _hook(self, key: str, value: str) -> Mistake | None:
        """layer= or site= with a name such as blocks.21.hook_resid_post, which says both."""
        point = point_elsewhere(value)
        if point is None or self.exactly(key) not in ("layer", "site"):
            return None
        site = "" if point.site == RESID_POST else f" site={point.site}"
        return Mistake(1, _HOOK, f"layer={point.layer}{site}")

    def _option(self, word: str, following: Sequence[str]) -> Mistake:
        """--layer 21, --layer=21 or -l 21."""
        key, sign, value = word.lstrip("-").partition("=")
        name = self.named(key)
        if name is None and len(key) == 1:
            name = next((name for name in self.settings if name.startswith(key)), None)
        takes = not sign and following
        flag = "true" if not sign and not takes else ""
        given = following[0] if takes else value or flag
        reason = "a setting is NAME=VALUE, without dashes"
        if hook := self._hook(key, given):
            return hook._replace(words=2 if takes else 1)
        if name is None:
            return Mistake(1, f"{reason}, and there is none of this name; {self.lists_all}", None)
        meant = f"{name}=..." if _OTHER_UNIT.fullmatch(_plain(key)) else self._right(name, given)
        return Mistake(2 if takes else 1, reason, meant)

    def _bare(self, words: Sequence[str], following: Sequence[str]) -> Mistake:
        """A word without a value, and what stands behind it: `layer 21`, `layer: 21`."""
        reason = "a setting is NAME=VALUE, without spaces"
        if self.exactly(words[0]) is None and exists(words[0]):
            return self._nameless(words[0])
        for group in self.groups:
            if words[0] in schema.options(group):
                return Mistake(1, reason, f"{group}={words[0]}")
        many = 0
        while many < len(words) and (many == 0 or _joins(words[many - 1], words[many])):
            many += 1
        key, _, value = re.sub(r"^([\w.]+)\s*[:=]\s*", r"\1=", "".join(words[:many])).partition("=")
        name = None if _PATH.search(key) else self.named(key)
        if name is None:
            return self._nameless(words[0])
        if not value and following:
            many, value = 2, following[0]
        itself = words[0] if is_path(name) and exists(words[0]) else "VALUE"
        return Mistake(many, reason, self._right(name, value or itself))

    def _right(self, name: str, value: str) -> str:
        """NAME=VALUE, but NAME.path=VALUE if NAME is a group without such an option."""
        wrong = self._choice(name, value) if name in self.groups and value != "VALUE" else None
        return (wrong and wrong.meant) or f"{name}={value}"

    def _nameless(self, word: str) -> Mistake:
        """A path without its name, or what has no name at all."""
        reason = "a setting is NAME=VALUE"
        if _PATH.search(word) or exists(word):
            is_model = self.command == "harvest" and exists(f"{word}/config.json")
            name = "model.path" if is_model else _OF_PATHS[self.command]
            return Mistake(1, reason, f"{name}={word}")
        return Mistake(1, f"{reason}; {self.lists_all}", None)

    def _setting(self, key: str, value: str) -> Mistake | None:
        if key in self.groups:
            return self._choice(key, value)
        if _THOUSANDS.fullmatch(value):
            return Mistake(1, "commas separate values", f"{key}={value.replace(',', '')}")
        having = self.settings.get(key)
        if having == () or key.startswith("text.sources."):
            return None
        if having is not None:
            chosen = [f"{group}={name}" for group, name in self.chosen.items()]
            if {*having} & {*chosen}:
                return None
            group = key.partition(".")[0]
            reason = f"{key} is a setting of {_any_of(having)}, and this is {group}="
            return Mistake(1, f"{reason}{self.chosen.get(group)}", None)
        if any(name.startswith(f"{key}.") for name in self.settings):
            return None
        return self._unknown(key, value)

    def _unknown(self, key: str, value: str) -> Mistake:
        reason = "there is no setting of this name"
        given = "..." if _OTHER_UNIT.fullmatch(_plain(key)) else value
        name = self.exactly(key)
        others = [other for other in COMMANDS if key in _names(other)]
        if others and (name is None or self._with(name)):
            modules = " and ".join(f"`python -m {module_of(other)}`" for other in others)
            return Mistake(1, f"it is a setting of {modules}; leave it out here", None)
        if name is None:
            for other in COMMANDS:
                if theirs := _Known(other, ()).exactly(key):
                    reason = f"it is {theirs}= of `python -m {module_of(other)}`"
                    return Mistake(1, f"{reason}; leave it out here", None)
        name = name or self.named(key)
        if name is None:
            return Mistake(1, f"{reason}; {self.lists_all}", None)
        return Mistake(1, reason, f"{name}={given}{self._with(name)}")

    def _with(self, name: str) -> str:
        """The option that brings a setting, where another one is chosen."""
        having = self.settings.get(name, ())
        group = having[0].partition("=")[0] if having else ""
        if not having or f"{group}={self.chosen[group]}" in having:
            return ""
        return f" with {_any_of(having)}"

    def _choice(self, group: str, value: str) -> Mistake | None:
        """GROUP=VALUE with a value that is none of its options."""
        options = schema.options(group)
        values = [text.strip() for text in value.strip("[]").split(",")]
        wrong = next((text for text in values if text not in options), None)
        if wrong is None or "(" in value or wrong.lower() in ("", "null") or wrong[:1] in "'\"$":
            return None
        nearest = near(wrong, options)
        path = f"{group}.path={wrong}" if f"{group}.path" in self.settings else None
        whole = value.replace(wrong, nearest) if nearest else None
        if path and _PATH.search(wrong):
            whole = None
        meant = " or ".join(each for each in (whole and f"{group}={whole}", path) if each)
        is_short = not meant or len(options) < 9
        listed = f"{group} is one of {', '.join(options)}" if is_short else "there is no such one"
        return Mistake(1, listed, meant or None)

    def named(self, key: str) -> str | None:
        """The setting that `key` names or nearly names."""
        return self.exactly(key) or self.names.get(near(_plain(key), self.names) or "")

    def exactly(self, key: str) -> str | None:
        """The setting that `key` names: in full, by its last part, or as other programs do."""
        plain = _plain(key)
        return self.names.get(plain) or self.names.get(plain.rpartition(".")[2])

    @cached_property
    def names(self) -> dict[str, str]:
        """Settings and groups by all of their names."""
        names = {name: name for name in (*self.settings, *self.groups)}
        # The last parts of names, those that are there now before those of other options.
        order = sorted(names, key=lambda name: (bool(self._with(name)), name.count(".")))
        for name in order:
            if not name.startswith("text.sources."):
                names.setdefault(name.rpartition(".")[2], name)
        for name, words in _ELSEWHERE.items():
            if name in names:
                names = dict.fromkeys(words.split(), name) | names
        return names


def _plain(key: str) -> str:
    return key.lower().replace("-", "_").lstrip("+~")


def _names(command: str) -> set[str]:
    return {*schema.everywhere(command), *schema.groups(schema.command_file(command))}


def _unquoted(words: Sequence[str]) -> Mistake | None:
    """The path of something that is there, cut at its spaces because quotes are missing."""
    name, _, value = words[0].partition("=")
    if not is_path(name) or exists(value):
        return None
    for many in range(2, len(words) + 1):
        if "=" in words[many - 1] or words[many - 1].startswith("-"):
            return None
        if exists(whole := " ".join([value, *words[1:many]])):
            return Mistake(many, "a value with spaces needs quotes", f"{name}={whole}")
    return None


def _joins(before: str, word: str) -> bool:
    """Whether two words are parts of one setting that was typed with spaces."""
    return before.endswith((":", "=")) or word in (":", "=") or word.startswith(("=", ":"))


def _any_of(options: Sequence[str]) -> str:
    return " or ".join(options) if len(options) <= 3 else f"{', '.join(options[:3])}, ..."


def near(text: str, known: Mapping[str, object]) -> str | None:
    """The one of `known` that is most like `text`, signs and capitals aside."""
    plain = {re.sub(r"[\W_]", "", name).lower(): name for name in reversed(list(known))}
    own = re.sub(r"[\W_]", "", text).lower()
    begins = [name for short, name in plain.items() if len(own) > 2 and short.startswith(own)]
    found = [plain[own]] if own in plain else get_close_matches(own, plain, 1, 0.7)
    nearest = [plain.get(name, name) for name in found] or sorted(begins, key=len)
    return nearest[0] if nearest else None
