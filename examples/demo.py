"""The main job on real data that comes with scikit-learn: handwritten digits from six sources.

Run ``make demo``, or ``python -m examples.demo``.
"""

from pathlib import Path

from examples.compare import compare, deal_out, quiet, report
from examples.datasets import digits

FOLDER = Path("artefacts/demo")


def main() -> None:
    """Compare on three seeds and print what came of it."""
    quiet()
    data, results = digits(), []
    for seed in range(3):
        problem = deal_out(data, seed, n_val=150, budget=0.2, batch_size=16, steps=1000)
        results.append(compare(problem, FOLDER, seed))
    print(report(problem, results, FOLDER))


if __name__ == "__main__":
    main()
