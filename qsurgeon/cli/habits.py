"""What people type who come from other tools: their options and commands, and the equivalents here.

A word means one of our options (then it is offered), or is answered with a sentence. Nothing is taken for what it
means in silence.
"""

from dataclasses import dataclass

# The argument, where an option is typed for it.
RECIPE, ADAPTER = "RECIPE", "ADAPTER"


@dataclass(frozen=True)
class Habit:
    """What an option of other tools is here: ``means`` one of ours, or what ``says`` answers.

    ``says`` may name {verb}, {typed} and {output}. value: whether a value follows. verb: what of ours it is instead.
    """

    means: str = ""
    says: str = ""
    value: bool = True
    verb: str = ""


_START = (
    "`qsurgeon recipes` lists the shipped ones, and `qsurgeon recipes w4a4-mxfp4 > mine.yaml` prints one to start from"
)
_FORMAT = f"a recipe says which format a layer gets: {_START}"
_MODULES = f"the rules of a recipe say which modules they take and leave: {_START}"
_OVERWRITE = "nothing is ever overwritten: name another folder, or remove {output} first"
_DEVICE = "no device is needed: a model is rewritten file by file on the CPU, and trains where you load it"
_QUIET = "results are on stdout and all else on stderr: leave {typed} out, or redirect one of the two"
_DATA = "no data is needed: weights are rounded as they are; static scales are found by qsurgeon.calibrate in Python"
_PACKED = "a recipe says it: `storage: packed`, as the shipped w4a4-mxfp4-packed does"
_TOKEN = "log in once with `hf auth login`"
_OFFLINE = "set HF_HUB_OFFLINE=1 for that"
_CACHE = "the hub's cache is where HF_HOME says"
_PRIVATE = "a repository is private unless --public says otherwise: leave {typed} out"
_KIND = "export takes the kind of checkpoint as --to compressed-tensors or --to dense; its formats are the model's own"
_WRITES_NOTHING = "{verb} writes nothing; to keep what it prints, redirect it: > FILE"
_LINE = "{verb} prints one line; what it wrote is shown by: qsurgeon inspect {output} --json"


def _table(*rows: tuple[str, Habit]) -> dict[str, Habit]:
    return {name: habit for names, habit in rows for name in names.split()}


# By the option without its dashes, lower case, with `-` for `_`.
OPTIONS = _table(
    ("recipe recipe-file recipe-path config config-file config-path c r cfg yaml scheme-file", Habit(RECIPE)),
    ("adapter adapter-path adapter-dir lora lora-path peft peft-model", Habit(ADAPTER)),
    ("model m model-path model-name model-id model-name-or-path base-model base checkpoint ckpt pretrained input "
     "input-model source src from i in model-dir input-dir hf-model repo-in", Habit("--model")),
    ("output output-dir output-path out out-dir save save-dir save-path save-to save-directory dest destination to "
     "export export-dir target-dir d", Habit("--output")),
    ("rev branch commit tag git-ref", Habit("--revision")),
    ("threads jobs j num-workers n-jobs parallel nproc num-proc max-workers cpus", Habit("--workers")),
    ("shard-size max-shard shard max-file-size", Habit("--max-shard-size")),
    ("push hub-model-id repo-id hub-id upload upload-to repo push-to-hub-model-id", Habit("--push-to-hub")),
    ("continue resume-from restart resume-from-checkpoint", Habit("--resume", value=False)),
    ("trust-remote-code-true trust remote-code allow-remote-code", Habit("--trust-remote-code", value=False)),
    ("allow-nan nan allow-inf", Habit("--allow-nonfinite", value=False)),
    ("full verbose-table expand", Habit("--all", value=False)),
    ("as-json", Habit("--json", value=False)),
    ("version", Habit(says="the version is printed by: qsurgeon --version", value=False, verb="--version")),
    ("dry-run dryrun n check preview simulate no-act what-if noop", Habit(value=False, verb="plan")),
    ("force f overwrite y yes exist-ok overwrite-output-dir clobber allow-overwrite no-confirm", Habit(
        says=_OVERWRITE, value=False)),
    ("device gpu device-map gpus gpu-id", Habit(says=_DEVICE)),
    ("cuda cpu no-cuda use-gpu mps low-memory low-cpu-mem-usage", Habit(says=_DEVICE, value=False)),
    ("format fmt bits b wbits abits w-bits a-bits scheme dtype torch-dtype quant-type quantization qformat method "
     "quant weight input-format weight-format weight-dtype group-size g block-size algorithm quantize w a "
     "scale-rule rounding hadamard seed gradient phases precision outtype", Habit(says=_FORMAT)),
    ("include exclude target targets ignore skip layers modules target-modules ignore-layers skip-layers",
     Habit(says=_MODULES)),
    ("quiet q silent v verbose debug log-level vv s no-progress", Habit(says=_QUIET, value=False)),
    ("dataset calibration calib calib-data calibration-data num-samples nsamples num-calibration-samples calib-size "
     "seqlen max-seq-length batch-size", Habit(says=_DATA)),
    ("packed pack save-compressed compress real-quant", Habit(says=_PACKED, value=False)),
    ("storage", Habit(says=_PACKED)),
    ("token hf-token use-auth-token auth-token", Habit(says=_TOKEN)),
    ("offline local-files-only local", Habit(says=_OFFLINE, value=False)),
    ("cache-dir cache", Habit(says=_CACHE)),
    ("private", Habit(says=_PRIVATE, value=False)),
)  # fmt: skip

# An option of ours, at a command of ours that has it not.
ELSEWHERE = {
    ("plan", "--output"): _WRITES_NOTHING,
    ("inspect", "--output"): _WRITES_NOTHING,
    **dict.fromkeys((("export", one) for one in ("--format", "--scheme", "--method")), _KIND),
    ("apply", "--json"): _LINE,
    ("apply", "--all"): _LINE,
}

# Commands of other tools: one of ours, or a sentence.
VERBS = {
    **dict.fromkeys(("quantize", "quant", "quantise", "convert", "compress", "ptq", "oneshot", "rewrite",
                     "save", "pack", "run-recipe", "transform", "wrap", "fake-quantize", "operate"), "apply"),
    **dict.fromkeys(("show", "info", "stat", "stats", "describe", "summary", "view", "report", "examine", "look",
                     "status", "print", "cat"), "inspect"),
    **dict.fromkeys(("check", "validate", "verify", "lint", "test", "dry-run", "dryrun", "preview", "diff", "try",
                     "simulate"), "plan"),
    **dict.fromkeys(("fuse", "merge-lora", "merge-adapter", "merge-and-unload", "fold", "bake"), "merge"),
    **dict.fromkeys(("list", "ls", "list-recipes", "recipe", "new", "init", "create", "template", "presets",
                     "examples"), "recipes"),
    **dict.fromkeys(("list-formats", "format", "dtypes", "types", "schemes"), "formats"),
    **dict.fromkeys(("json-schema", "jsonschema"), "schema"),
    **dict.fromkeys(("exec", "start", "launch", "with"), "run"),
}  # fmt: skip
SAID_OF_VERBS = {
    **dict.fromkeys(("help", "usage", "man", "commands"), "help is printed by: qsurgeon --help"),
    **dict.fromkeys(("version", "ver", "--ver"), "the version is printed by: qsurgeon --version"),
    **dict.fromkeys(("upload", "push", "publish"), "a folder is uploaded by: hf upload REPO FOLDER, or while it is "
                    "written: qsurgeon apply RECIPE --model MODEL --output FOLDER --push-to-hub REPO"),
    **dict.fromkeys(("download", "fetch", "pull", "get"), "a hub id behind --model is downloaded: "
                    "qsurgeon apply RECIPE --model owner/name --output FOLDER"),
    **dict.fromkeys(("train", "finetune", "fine-tune", "sft", "grpo", "eval", "evaluate", "bench", "benchmark",
                     "generate", "chat", "serve", "infer", "inference", "load"),
                    "any program does that with a folder that apply wrote: qsurgeon run -- COMMAND ARGS..."),
    **dict.fromkeys(("calibrate", "calib", "reference", "watch"),
                    "that is for a live model, in Python: qsurgeon.{verb}"),
    **dict.fromkeys(("undo", "revert", "restore", "dequantize", "unwrap", "unapply", "clean", "rm", "remove", "delete"),
                    "the model that a recipe was applied to is as it was; remove the folder that apply wrote"),
    **dict.fromkeys(("config", "configure", "login", "setup"), "there is nothing to set up: a recipe says it all, and "
                    "`hf auth login` logs in to the hub"),
    **dict.fromkeys(("install", "update", "upgrade", "uninstall"), "pip does that: pip install --upgrade qsurgeon"),
}  # fmt: skip
