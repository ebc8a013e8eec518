"""The picture, the numbers and the claims of ``reward_mixture``."""

from typing import Any

import numpy as np

from experiments._framework import curves, evidence
from experiments._framework.evidence import Finding
from experiments._framework.experiment import Claim
from experiments._framework.results import Record, Summary
from experiments.samplers import eight_gaussians as mixture
from unrollgrad.running import need

LEAN, BASIC = "adjoint matching", "adjoint matching, basic"
STYLES = {
    "DRaFT": ("C0", "o"),
    "DRaFT-5": ("C9", "s"),
    "DRaFT-1": ("C2", "^"),
    "DRaFT-LV": ("C8", "v"),
    "AlignProp": ("C1", "P"),
    "AlignProp, unbiased": ("C4", "X"),
    "DRTune": ("C5", "*"),
    "ES": ("C7", "D"),
    LEAN: ("C3", "d"),
    BASIC: ("darkred", "H"),
}
"""The colour and the marker of each method."""
MAXIMISERS = tuple(name for name in STYLES if name not in (LEAN, BASIC))
PLACES = {
    "start": "untrained",
    "on the way": "5 % of DRaFT",
    "tilted": "end of adjoint matching",
}
"""The thetas at which gradients are measured."""
LEAST = 1e-3
"""Smaller divergences, and negative ones, which are noise, are drawn here."""

Table = dict[tuple[str, str, str], np.ndarray]


def table(records: list[Record]) -> Table:
    """Numbers by (estimator, place, metric): an array of shape (seeds, points)."""
    found: dict[tuple[str, str, str], dict[int, list[float]]] = {}
    for r in records:
        key = r.labels["estimator"], r.labels["place"], r.metric
        found.setdefault(key, {}).setdefault(r.seed, []).append(r.value)
    out = {}
    for key, runs in found.items():
        length = min(map(len, runs.values()))  # an interrupted run has fewer
        out[key] = np.array([values[:length] for values in runs.values()])
    return out


def names_of(found: Table) -> list[str]:
    """The methods of a table, in its order."""
    return list(dict.fromkeys(name for name, *_ in found))


def draw(records: list[Record], config: dict[str, Any]) -> Any:
    """Reward, distance and frontier above; the modes and the gradients below."""
    figure = need("matplotlib.figure", "matplotlib").Figure(figsize=(15, 9.5), layout="constrained")
    axes = figure.subplots(2, 3)
    found, scale = table(records), config["reward_scale"]
    target = mixture.tilted(scale)
    _curves(axes[0, 0], found, "reward")
    axes[0, 0].axhline(mixture.mean_reward(target), color="black", ls=":", lw=1)
    axes[0, 0].set(ylabel="mean reward", title="reward; dotted: of the tilted law")
    axes[0, 0].set_yscale("symlog", linthresh=0.1)
    axes[0, 0].set_ylim(top=0.02)
    _curves(axes[0, 1], found, "kl")
    axes[0, 1].set(yscale="log", ylabel="KL(samples | tilted law), nats")
    axes[0, 1].set(title="distance to the tilted law")
    _frontier(axes[0, 2], found)
    _modes(axes[1, 0], found, target)
    _gradients(axes[1, 1], found, "cosine")
    axes[1, 1].set(xlabel="cosine of the mean gradient to the whole gradient")
    axes[1, 1].set_title("direction, in the seeds that can tell")
    axes[1, 1].set_xlim(-1.1, 1.1)
    axes[1, 1].legend(fontsize=8, title="theta", loc="lower left")
    _gradients(axes[1, 2], found, "noise")
    _gradients(axes[1, 2], found, "noise_above")
    axes[1, 2].set(xscale="log", xlabel="variance of one sample / |mean gradient|²")
    axes[1, 2].set_title("noise; hollow: more than this")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5)
    return figure


def _curves(axis: Any, found: Table, metric: str) -> None:
    for name in names_of(found):
        if (name, "", metric) not in found:
            continue
        lines = found[name, "", metric]
        lines = np.maximum(lines, LEAST) if metric == "kl" else lines
        at, mean = found[name, "", "evaluations"].mean(0) / 1e3, lines.mean(0)
        color, marker = STYLES.get(name, ("black", "."))
        axis.plot(at[1:], mean[1:], color=color, marker=marker, ms=5, label=name)
        if len(lines) > 1:
            se = lines.std(0, ddof=1) / len(lines) ** 0.5
            axis.fill_between(at[1:], (mean - se)[1:], (mean + se)[1:], color=color, alpha=0.2)
    axis.set(xscale="log", xlabel="network evaluations for each of the samples, thousands")
    axis.grid(alpha=0.3)


def _frontier(axis: Any, found: Table) -> None:
    """The reward against the divergence from the data's law, and the best that is possible."""
    axis.plot(*mixture.frontier(np.geomspace(1e-3, 100, 200)), color="black", ls=":", lw=1)
    for name in names_of(found):
        if (name, "", "kl_data") not in found:
            continue
        far, reward = (found[name, "", metric].mean(0) for metric in ("kl_data", "reward"))
        color, marker = STYLES.get(name, ("black", "."))
        axis.plot(far, reward, color=color, marker=marker, ms=4, lw=1)
    axis.set(xlabel="KL(samples | data's law), nats", ylabel="mean reward")
    axis.set_title("a reward and its cost; dotted: tilted laws")
    axis.set_xscale("symlog", linthresh=1.0)
    axis.set_xlim(left=-0.1)
    axis.grid(alpha=0.3)


def _modes(axis: Any, found: Table, target: mixture.Law) -> None:
    """The shares of the eight modes, in the order of their distance from the target."""
    order = np.argsort(np.sum((target.means - mixture.TARGET) ** 2, -1), kind="stable")
    axis.bar(range(8), target.weights[order], color="lightgrey", label="tilted law")
    for name in names_of(found):
        if (name, "modes", "share") in found and found[name, "modes", "share"].shape[1] == 8:
            color, marker = STYLES.get(name, ("black", "."))
            share = found[name, "modes", "share"].mean(0)[order]
            axis.plot(range(8), share, color=color, marker=marker, ls="", alpha=0.8)
    axis.set(xlabel="mode, nearest to the target first", ylabel="share of the samples at the end")
    axis.set_title("modes; grey: the tilted law")
    axis.grid(alpha=0.3)


def _gradients(axis: Any, found: Table, metric: str) -> None:
    """A row for each method, a mark for each theta; hollow if it is a bound in a seed."""
    names = [name for name in STYLES if (name, "", "reward") in found]
    bound = metric.endswith("above")
    for i, (place, words) in enumerate(PLACES.items()):
        told = [(j, n) for j, n in enumerate(names) if (n, place, metric) in found]
        rows = [(j, n) for j, n in told if bound or (n, place, "noise_above") not in found]
        seeds = [found[n, place, metric] for _, n in rows]
        spread = [np.std(x, ddof=1) / len(x) ** 0.5 if len(x) > 1 else 0.0 for x in seeds]
        heights = [j + 0.2 * (i - 1) for j, _ in rows]
        style = {"color": f"C{(0, 1, 3)[i]}", "fillstyle": "none" if bound else "full"}
        style |= {"fmt": "os^"[i], "label": None if bound else words}
        axis.errorbar([np.mean(x) for x in seeds], heights, xerr=spread, **style)
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.grid(True, alpha=0.3)


def show(records: list[Record]) -> None:
    """Prints a line for each method: the end of its run, the way to it, and its gradients."""
    found = table(records)

    def mean(name, place, metric):
        values = found.get((name, place, metric))
        return float("nan") if values is None else float(np.mean(values[:, -1]))

    def text(name, place, metric):
        """Over the seeds in which it and the whole gradient can be told."""
        if (name, place, metric) not in found:
            return "?"
        values, all_seeds = found[name, place, metric][:, -1], len(found[name, "", "reward"])
        seeds = f" ({len(values)} seeds)" if len(values) < all_seeds else ""
        return curves.seeds_text(values.tolist()) + seeds

    print(f"{'':>24}   rate | reward early, at equal seconds, end | KL least, end, modes | ms")
    for name in names_of(found):
        way = [mean(name, "path", m) for m in ("reward_early", "reward_at_seconds")]
        ends = [mean(name, "", m) for m in ("reward", "kl", "kl_modes", "seconds")]
        updates = mean(name, "", "evaluations"), ends.pop()
        print(
            f"{name:>24} {mean(name, '', 'rate'):6.3f} | {way[0]:8.2f} {way[1]:8.2f} {ends[0]:8.3f}"
            f" | {mean(name, 'path', 'kl_least'):7.3f} {ends[1]:7.3f} {ends[2]:7.3f}"
            f" | {1e3 * updates[1] / max(updates[0], 1):.3f} per evaluation"
        )
    for place, words in PLACES.items():
        print(f"gradients, {words}: norm ratio, noise, cosine (?: mostly noise in a seed)")
        for name in names_of(found):
            if (name, place, "noise_above") in found:
                bound = f"> {mean(name, place, 'noise_above'):.3g}"
                print(f"{name:>24} {'?':>24} {bound:>13} {'?':>24}")
                continue
            texts = [text(name, place, m) for m in ("norm_ratio", "noise", "cosine")]
            print(f"{name:>24} {texts[0]:>24} {texts[1]:>13} {texts[2]:>24}")


ADJOINT = "Domingo-Enrich et al. 2025; the tilted law in closed form"
CLARK, ALIGNPROP = "Clark et al. 2024", "Prabhudesai et al. 2023"


def claims(summary: Summary) -> list[Claim]:
    """Who ends at the tilted law, whose gradients are whole, and the order per evaluation."""
    find = summary.find

    def every(metric, place, others, test):
        """The finding about each of several methods; its text is the least certain one's."""
        found = {name: test(find(metric, estimator=name, place=place)) for name in others}
        return worst(found)

    lean = find("kl", estimator=LEAN, place="")
    out = [
        Claim(
            "adjoint matching ends closer to the tilted law (KL) than every method that maximises "
            "the mean reward",
            ADJOINT,
            *every("kl", "", MAXIMISERS, lambda other: evidence.less(lean, other)),
        ),
        Claim(
            "adjoint matching ends closer to it than each of them is at its best moment",
            ADJOINT,
            *every("kl_least", "path", MAXIMISERS, lambda other: evidence.less(lean, other)),
        ),
        Claim(
            "with adjoint matching, lean or basic, the modes have the tilted proportions: their KL "
            "is below 0.05",
            ADJOINT,
            *every("kl_modes", "", (LEAN, BASIC), lambda x: evidence.below(x, 0.05)),
        ),
        Claim(
            "every other method leaves the modes less in proportion: their KL ends above 0.3",
            ADJOINT,
            *every("kl_modes", "", MAXIMISERS, lambda x: evidence.above(x, 0.3)),
        ),
    ]
    early = {name: find("reward_early", estimator=name, place="path") for name in STYLES}
    few, whole = early["DRaFT-5"], early["DRaFT"]
    losses = {name: x and evidence.times(x, -1.0) for name, x in early.items()}
    out += [
        _claim(
            "after 2 % of the budget the gradient of the last five steps has earned more reward "
            "than the whole one",
            f"{CLARK}: few steps learn faster per evaluation",
            evidence.more(few, whole),
        ),
        Claim(
            "evolution strategies earn reward last",
            "theory: the variance grows with the number of parameters",
            *worst(
                {
                    name: evidence.more(losses["ES"], losses[name])
                    for name in MAXIMISERS
                    if name != "ES"
                }
            ),
        ),
    ]
    return [*out, *_about_gradients(find)]


def _about_gradients(find: Any) -> list[Claim]:
    def at_start(name, metric, test):
        finding = test(find(metric, estimator=name, place="start"))
        if any(find("noise_above", estimator=n, place="start") for n in (name, "DRaFT")):
            text = f"{finding.text}, but in another seed the mean is mostly noise"
            return Finding(None, text)
        return finding

    def noise(name):
        return find("noise", estimator=name, place="on the way")

    return [
        _claim(
            "AlignProp with the unbiased weights has the whole gradient as its mean: the cosine is "
            "above 0.95",
            "theory: Russian roulette",
            at_start("AlignProp, unbiased", "cosine", lambda x: evidence.above(x, 0.95)),
        ),
        _claim(
            "plain AlignProp does not: the norm of its mean is less than 0.9 of the whole one's",
            f"{ALIGNPROP}; theory: step k counts P(K >= k) times",
            at_start("AlignProp", "norm_ratio", lambda x: evidence.below(x, 0.9)),
        ),
        _claim(
            "at the base model adjoint matching has the whole gradient's direction: the cosine is "
            "above 0.95",
            ADJOINT,
            at_start(LEAN, "cosine", lambda x: evidence.above(x, 0.95)),
        ),
        _claim(
            "the last step alone points elsewhere: its cosine to the whole gradient is below 0.9",
            "theory: it sees a share S_1 / S_T",
            at_start("DRaFT-1", "cosine", lambda x: evidence.below(x, 0.9)),
        ),
        _claim(
            "the unbiased weights have more noise than the plain ones",
            "theory: variance grows with the influence of early steps",
            evidence.more(noise("AlignProp, unbiased"), noise("AlignProp")),
        ),
    ]


def worst(found: dict[str, Finding]) -> tuple[str, bool | None]:
    """The findings that do not hold, with their methods, or the last one; the verdict on all."""
    failed = [name for name, finding in found.items() if not finding.holds] or [*found][-1:]
    return "; ".join(f"{name}: {found[name].text}" for name in failed), evidence.both(
        *found.values()
    )


def _claim(says: str, source: str, finding: Finding) -> Claim:
    return Claim(says, source, finding.text, finding.holds)
