"""Run benchmarks and keep their results: `python -m benchmarks.run [NAME ...]`; all of them without
a name.
"""

import argparse
import importlib
import pkgutil
import warnings

import benchmarks
from benchmarks import common


def main() -> None:
    modules = [m.name for m in pkgutil.iter_modules(benchmarks.__path__)]
    names = [name.removeprefix("bench_") for name in modules if name.startswith("bench_")]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(names))
    chosen = parser.parse_args().names or names
    unknown = sorted(set(chosen) - set(names))
    if unknown:
        parser.error(f"unknown benchmark {unknown[0]}; choose from {', '.join(names)}")
    # The published loop steps its scheduler before its optimiser, which torch points out each time.
    warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
    for name in chosen:
        print(f"== {name}")
        result = importlib.import_module(f"benchmarks.bench_{name}").run()
        if all(str(row.get("status", "")).startswith("not measured") for row in result["rows"]):
            print("nothing was measured, nothing is written")
            continue
        path = common.write_results(name, result)
        print(f"written to {path.relative_to(common.RESULTS.parent.parent)}")


if __name__ == "__main__":
    main()
