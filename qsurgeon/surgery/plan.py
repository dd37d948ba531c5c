"""What a recipe does to each module of one model, decided before any tensor is read. Pure."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from qsurgeon.errors import FormatError, Mistake, PlanError
from qsurgeon.formats import Format
from qsurgeon.layers import Quantization, packed_format
from qsurgeon.layers.kinds import DEFAULT, KINDS, listed
from qsurgeon.layers.noise import Noise
from qsurgeon.layers.packed import refused_by_packing
from qsurgeon.recipe import Recipe
from qsurgeon.recipe.select import OUTPUT_HEAD, Match, Namespace, parse_pattern
from qsurgeon.storage import Encoding
from qsurgeon.surgery.headline import Part, headline
from qsurgeon.surgery.inventory import Module
from qsurgeon.surgery.reader import Reader

MOST_KINDS = 4  # that an error lists, of the modules that cannot be wrapped


@dataclass(frozen=True)
class Excluded:
    """A rule named a module and one of its exclude patterns took it out again."""

    rule: str
    pattern: str


@dataclass(frozen=True)
class Step:
    """One weight of one module and its fate: how it computes, or what excluded it, or None: no rule names it.

    noise: the multiplier of the noise that it gets. still: why a norm gets none, where the recipe has noise.
    """

    module: Module
    fate: Quantization | Excluded | None
    noise: float | None = None
    still: str = ""

    @property
    def quantization(self) -> Quantization | None:
        """How the module computes; None if it stays as it is."""
        return self.fate if isinstance(self.fate, Quantization) else None

    def packed_bytes(self, encoding: Encoding) -> int:
        """Return what the module takes once its weight is packed, which is not tied to another's then."""
        how = self.quantization
        # A record may name anything.
        if how is None or how.weight is None or self.module.wraps is None or len(self.module.shape) != 2:
            return self.module.bytes
        own = 0 if self.module.tied_to is not None else self.module.weight_bytes
        rows, columns = self.module.row_shape
        return self.module.bytes - own + encoding.bytes(packed_format(how), rows, columns)

    @property
    def remark(self) -> str:
        """Say which code may compute past the module, if any; what is sure to is refused when a plan is made."""
        past = [one for one in self.module.readers if one.takes_values]
        return past[0].remark if past and self.quantization is not None else ""

    @property
    def why(self) -> str:
        """Return the reason in words; nothing for a module that only holds others."""
        match self.fate:
            case Quantization(why=why):
                return why + (f"; {self.remark}" if self.remark else "")
            case Excluded(rule, pattern):
                return f"excluded by '{pattern}' of rule '{rule}'"
        if self.noise is not None:
            return f"noise ×{self.noise:g}"
        if self.still:
            return self.still
        if self.module.adapter and self.module.parameters:
            return "adapter of peft: stays in full precision"
        if self.module.type == DEFAULT:
            return "no rule names it"
        if self.module.type:
            return f"no rule with 'types: [{self.module.type}]' names it"
        return f"not a {listed(self.module.types)}" if self.module.parameters or self.module.tied_to else ""


@dataclass(frozen=True)
class Plan:
    """Every module's fate, in the model's order, the recipe that decided, and the noise that norms get."""

    steps: tuple[Step, ...]
    recipe: Recipe
    noise: Noise | None = None

    @property
    def wrapped(self) -> tuple[Step, ...]:
        """The steps that change a module."""
        return tuple(step for step in self.steps if step.quantization is not None)

    @property
    def remarks(self) -> tuple[str, ...]:
        """What ``why`` cannot promise of modules that are wrapped, in words."""
        found: dict[str, list[str]] = {}
        for step in self.wrapped:
            if step.remark:
                found.setdefault(step.remark, []).append(step.module.name)
        return tuple(f"{_and_more(names)}: {remark}" for remark, names in found.items())

    @property
    def growth(self) -> int:
        """How many bytes more the parameters take once the model is operated on; fewer where it is negative."""
        owned = {step.module.tied_weight for step in self.steps}
        grown = 0
        for step in self.wrapped:
            how, module = step.quantization, step.module
            stays = module.weight_bytes if module.parameter in owned else 0  # with those that are tied to it
            encoding = self.recipe.encoding
            if encoding is not None and how is not None and how.weight is not None:
                grown += step.packed_bytes(encoding) - module.bytes + stays
            elif module.tied_to is not None:
                grown += module.weight_bytes  # a copy of its own
            else:
                grown += stays
        return grown

    @property
    def summary(self) -> str:
        """How much of the model is wrapped, in one line."""
        return headline(Part.of(step.module, step.quantization) for step in self.steps)


@dataclass
class _Planner:
    """What is known while a plan is being made: who names what, and what is wrong."""

    recipe: Recipe
    modules: dict[str, Module]
    namespace: Namespace
    mistakes: list[Mistake] = field(default_factory=list)
    decided: dict[str, Quantization | Excluded] = field(default_factory=dict)

    def report(self, message: str, *path: str | int) -> None:
        where, excerpt = self.recipe.where(*path)
        self.mistakes.append(Mistake(where, message, excerpt))

    def apply_rule(self, place: int) -> None:
        """Decide for the modules that the rule at ``place`` is the first to name."""
        rule, name = self.recipe.rules[place], self.recipe.rule_name(place)
        before = len(self.mistakes)
        targets = self._targets(place)
        excluded: dict[str, str] = {}
        for number, pattern in enumerate(rule.exclude):
            for one in self._match(pattern, "rules", place, "exclude", number).names:
                excluded.setdefault(one, pattern)
        taken = [one for one in targets if one not in excluded]
        if not taken and len(self.mistakes) == before and not self._all_optional(place):
            types = listed(rule.types)
            self.report(f"rule '{name}' excludes every {types} that it targets{self._others(place)}", "rules", place)
        fresh = [one for one in taken if not isinstance(self.decided.get(one), Quantization)]
        if taken and not fresh:
            self.report(f"rule '{name}' decides nothing: earlier rules took all it names", "rules", place)
        quantization = self._quantization(place)
        if quantization is not None:
            self._check_rotation(quantization, fresh, place)
            self._check_readers(quantization, fresh, place)
            self._check_kinds(quantization, fresh, place)
            for one in fresh:
                self._check_tie(self.modules[one], place)
                self.decided[one] = quantization
        for one, pattern in excluded.items():
            if one in targets:
                self.decided.setdefault(one, Excluded(name, pattern))

    def _match(self, pattern: str, *path: str | int) -> Match:
        """Return what ``pattern`` names, reporting it if that is nothing, or if one of its words names nothing."""
        parsed = parse_pattern(pattern)
        match = self.namespace.match(parsed)
        if parsed.optional:
            return match
        if not match.names:
            self.report(f"'{pattern}' names no module; {self.namespace.hint(parsed)}", *path)
        elif match.unused:
            self.report(f"'{pattern}': nothing is named by {', '.join(match.unused)}", *path)
        return match

    def _targets(self, place: int) -> list[str]:
        """Return the modules of the rule's types that its targets name, in the model's order."""
        rule = self.recipe.rules[place]
        found: set[str] = set()
        for number, pattern in enumerate(rule.target):
            names = self._match(pattern, "rules", place, "target", number).names
            takeable = {one for one in names if self.modules[one].type in rule.types}
            if names and not takeable and not parse_pattern(pattern).optional:
                message = _nothing_to_take(pattern, rule.types, [self.modules[one] for one in names])
                self.report(message, "rules", place, "target", number)
            found |= takeable
        return [name for name in self.modules if name in found]

    def _others(self, place: int) -> str:
        """Return the end of a message: which modules with a matrix of weights a rule names, and cannot take."""
        types = self.recipe.rules[place].types
        patterns = map(parse_pattern, self.recipe.rules[place].target)
        named = {name for pattern in patterns for name in self.namespace.match(pattern).names}
        found = [one for name, one in self.modules.items() if name in named]
        others = Counter(one.type for one in found if one.type and one.type not in types)
        kinds: Counter[str] = Counter()
        for one in found:
            if not one.type and not one.adapter and one.parameters and len(one.shape) > 1:
                kinds[one.kind] += one.parameters
        if others:
            told = listed((f"{count} {name}" for name, count in others.items()), "and")
            return f"; it also names {told}, which '{_types(types, others)}' takes"
        if not kinds:
            return ""
        told = ", ".join(
            f"{sum(one.kind == kind for one in found)} {kind}" for kind, _ in kinds.most_common(MOST_KINDS)
        )
        return f"; what it also names is not {_sources(types)} itself and never wrapped: {told}"

    def _all_optional(self, place: int) -> bool:
        return all(parse_pattern(pattern).optional for pattern in self.recipe.rules[place].target)

    def _quantization(self, place: int) -> Quantization | None:
        rule = self.recipe.rules[place]
        formats = {}
        for role in ("weight", "input"):
            name = getattr(rule, role)
            try:
                formats[role] = None if name is None else self.recipe.format(name)
            except FormatError as error:
                self.report(str(error), "rules", place, role)
                return None
        if self.recipe.encoding is not None and formats["weight"] is not None:
            self._check_packing(place, formats["weight"])
        try:
            return Quantization(
                formats["weight"],
                formats["input"],
                self.recipe.behavior(place),
                self.recipe.rule_name(place),
            )
        except FormatError as error:
            self.report(f"rule '{self.recipe.rule_name(place)}': {error}", "rules", place)
            return None

    def _check_packing(self, place: int, weight: Format) -> None:
        """Report what a rule asks of a weight that a packed one cannot do."""
        name = self.recipe.rule_name(place)
        if refused := refused_by_packing(self.recipe.behavior(place)):
            field, why = refused
            self.report(
                f"rule '{name}': {why}; say 'storage: master', or leave the weight out of the rule",
                "rules",
                place,
                field,
            )
        if weight.tensor_scale == "static" and weight.static_scale is None:
            self.report(
                f"format '{weight.name}' of rule '{name}' has a static tensor scale without a number: a weight is "
                "packed before any calibration; give it a static_scale, or say 'tensor_scale: tensor'",
                "rules",
                place,
                "weight",
            )

    def _check_rotation(self, how: Quantization, names: list[str], place: int) -> None:
        """Report the first module whose inputs the rotation does not divide."""
        for one in names:
            inputs = self.modules[one].row_shape[-1]
            if how.rotation is not None and inputs % how.rotation.size:
                self.report(
                    f"rule '{self.recipe.rule_name(place)}' rotates {how.rotation.size} values at a time, which does "
                    f"not divide the {inputs} inputs of {one}",
                    "rules",
                    place,
                    "target",
                )
                return

    def _check_kinds(self, how: Quantization, names: list[str], place: int) -> None:
        """Report the first module of a kind whose weights cannot be packed, where they are to be."""
        for one in names:
            kind = self.modules[one].wraps
            if self.recipe.encoding is not None and how.weight is not None and kind is not None and kind.packed is None:
                self.report(
                    f"rule '{self.recipe.rule_name(place)}' takes {one}, a {kind.name}, whose weights cannot be "
                    "packed: say 'storage: master', or exclude it",
                    "rules",
                    place,
                    "types",
                )
                return

    def _check_readers(self, how: Quantization, names: list[str], place: int) -> None:
        """Report modules whose weight is taken by code that would compute past them, or misread what is packed."""
        packs = self.recipe.encoding is not None and how.weight is not None
        found: dict[tuple[str, str], dict[str, Reader]] = {}
        for one in names:
            for reader in self.modules[one].readers:
                if reader.misreads_codes if packs else reader.takes_values and reader.certain:
                    found.setdefault((reader.where, "" if reader.takes_values else reader.what), {})[one] = reader
                    break
        for (where, what), taken in found.items():
            patterns = dict.fromkeys(".".join(one.split(".")[-2:]) for one in taken)
            way = "exclude " + ", ".join(f"'{one}'" for one in patterns)
            if what:
                wrong = f"asks the weight for its {what}, which differs once it is packed"
                way += ", or say 'storage: master'"
            else:
                certain = all(reader.certain for reader in taken.values())
                wrong = "takes the weight itself and computes with it" + ("" if certain else ", in some calls")
            reached = f"rule '{self.recipe.rule_name(place)}' reaches {_and_more(list(taken))}"
            self.report(f"{reached}: {where} {wrong}; {way}", "rules", place)

    def _check_tie(self, module: Module, place: int) -> None:
        others = [one for one in self.modules.values() if one.tied_weight == module.parameter]
        tied = module.tied_to or (others[0].name if others else None)
        if tied is None:
            return
        knot = module.parameter if module.tied_to else others[0].parameter
        ties = [tie for one in self.modules.values() for tie in one.shared]
        also = [tie for tie in ties if tie != knot]
        if self.recipe.untie and also:
            self.report(
                f"'untie: true' cannot give {module.name} a weight of its own: this model ties {also[0]} too, and its "
                "config unties all or nothing",
                "rules",
                place,
                "target",
            )
        if not self.recipe.untie:
            self.report(
                f"rule '{self.recipe.rule_name(place)}' reaches {module.name}, whose weight is tied to {tied}: "
                f"exclude {module.name}, or say 'untie: true'",
                "rules",
                place,
                "target",
            )


def _nothing_to_take(pattern: str, types: Sequence[str], named: Sequence[Module]) -> str:
    """Return the message on a pattern that names modules, and none of a rule's ``types``."""
    kinds = ", ".join(sorted({one.kind + (" (adapter)" if one.adapter else "") for one in named}))
    others = dict.fromkeys(one.type for one in named if one.type)
    start = f"'{pattern}' names no {listed(types)}, only {kinds}; "
    if others:
        return f"{start}say '{_types((), others)}' to take the {listed(others, 'and')} modules"
    return f"{start}only {_sources(types)} itself is wrapped"


def _types(types: Iterable[str], others: Iterable[str]) -> str:
    return f"types: [{', '.join((*types, *others))}]"


def _sources(types: Iterable[str]) -> str:
    return listed(KINDS[name].source_name for name in types)


def _and_more(names: Sequence[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if names[1:] else "")


def build_plan(recipe: Recipe, modules: Sequence[Module]) -> Plan:
    """Decide the fate of every module. Reads no file, touches no tensor.

    Raises: PlanError with every mistake: a pattern, or a word in its braces, that names nothing; a target without
    a module of the rule's types; a rule that decides nothing; a tied weight; a weight that other code takes; an
    unknown format.
    """
    if recipe.extends is not None:
        where, excerpt = recipe.where("extends")
        raise PlanError([Mistake(where, "a recipe made in Python is not merged with another; write a file", excerpt)])
    roles = {OUTPUT_HEAD: [one.name for one in modules if one.output_head]}
    namespace = Namespace([one.name for one in modules], roles)
    planner = _Planner(recipe, {one.name: one for one in modules}, namespace)
    for place in range(len(recipe.rules)):
        planner.apply_rule(place)
    if not planner.mistakes and not any(isinstance(fate, Quantization) for fate in planner.decided.values()):
        planner.report("the recipe wraps nothing: each target ends in '?', and the model has none of them", "rules")
    if planner.mistakes:
        raise PlanError(planner.mistakes)
    return Plan(tuple(Step(one, planner.decided.get(one.name)) for one in modules), recipe)
