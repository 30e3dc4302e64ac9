"""Run POT's own published tests against `pisces_kernels.compat.pot`.

    python tests/upstream/run_pot.py pot-0.9.7.post1.tar.gz pot-0.9.4.tar.gz
    python tests/upstream/run_pot.py --download CACHE_DIR

The tests come from POT's source distributions on the package index, are unpacked into a temporary folder and are not
part of this repository. Every module of the installed POT gets our functions in place of its own (`pot_plugin.py`), a
counter tells which tests called them, and the run fails unless all of those passed and none is missing. The tests
of the unbalanced solvers are those of POT 0.9.4, the last distribution that has them.

`--control` makes every second result wrong and succeeds if the tests notice. `--peer` runs POT's own functions.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
from dataclasses import dataclass
from pathlib import Path

INDEX = "https://files.pythonhosted.org/packages"


@dataclass(frozen=True)
class Source:
    """One source distribution and the tests in it that reach our functions.

    Attributes:
        name: file name.
        folder: place under `INDEX`.
        sha256: of the file.
        tests: the tests of each file that call our functions: their names, or patterns of names with parameters.
        expected: how many parametrised tests call our functions.
    """

    name: str
    folder: str
    sha256: str
    tests: dict[str, str]
    expected: int


SOURCES = (
    Source(
        name="pot-0.9.7.post1.tar.gz",
        folder="8f/e3/61271810cdea79e869531bbfcbc2b5a1d94e88ec5ebdd32ed81aa2ff40cc",
        sha256="2edd70845047ac2d378487b980a2bffb5ff58e9b92b7133896ff5753f6300cec",
        tests={
            "test_bregman.py": """
                test_convergence_warning test_empirical_sinkhorn test_empirical_sinkhorn_divergence
                test_empirical_sinkhorn_divergence_gradient test_empirical_sinkhorn_divergence_warmstart
                test_empirical_sinkhorn_warmstart test_free_support_sinkhorn_barycenter test_geomloss_solver
                test_implemented_methods test_lazy_empirical_sinkhorn test_nan_warning test_not_implemented_method
                test_screenkhorn test_sinkhorn test_sinkhorn2_backends test_sinkhorn2_gradients
                test_sinkhorn2_variants_dtype_device test_sinkhorn2_variants_multi_b test_sinkhorn_backends
                test_sinkhorn_empty test_sinkhorn_multi_b test_sinkhorn_stabilization test_sinkhorn_variants
                test_sinkhorn_variants_dtype_device test_sinkhorn_variants_log test_sinkhorn_variants_log_multib
                test_sinkhorn_variants_multi_b test_sinkhorn_warmstart test_stabilized_vs_sinkhorn_multidim
            """,
            "test_partial.py": """
                test_entropic_partial_wasserstein_gradient
                test_entropic_partial_wasserstein_logscale_approaches_exact_at_small_reg
                test_entropic_partial_wasserstein_logscale_input_validation
                test_entropic_partial_wasserstein_logscale_log_dict
                test_entropic_partial_wasserstein_logscale_matches_old_at_large_reg
                test_entropic_partial_wasserstein_logscale_no_nan_at_small_reg
                test_entropic_partial_wasserstein_method_default_is_sinkhorn
                test_entropic_partial_wasserstein_method_invalid
                test_entropic_partial_wasserstein_method_is_case_insensitive
                test_entropic_partial_wasserstein_method_log_dict
                test_entropic_partial_wasserstein_method_sinkhorn_log_matches_logscale
                test_partial_gromov_wasserstein test_partial_wasserstein test_raise_errors
            """,
            "test_solvers.py": """
                test_solve test_solve_bary_sample*-0.1-KL-None-* test_solve_bary_sample*-0.1-entropy-None-*
                test_solve_detach test_solve_envelope test_solve_grid*-0.1-KL-None-* test_solve_grid*-0.1-entropy-None-*
                test_solve_gromov_grid*-0.1-entropy-None-* test_solve_gromov_grid*-0.1-entropy-1.0-partial-*
                test_solve_last_step test_solve_sample_debias test_solve_sample_geomloss test_solve_sample_lazy
                test_zero_mass_solvers
            """,
            "test_da.py": """
                test_log_da test_sinkhorn_l1l2_transport_class test_sinkhorn_lpl1_transport_class
                test_sinkhorn_transport_class test_unbalanced_sinkhorn_transport_class
            """,
            "test_coot.py": "test_entropic_coot",
            "test_factored.py": "test_factored_ot test_factored_ot_backends",
            "test_lowrank.py": "test_nystroem_sinkhorn test_nystroem_sinkhorn2",
            "test_optim.py": "test_gcg_no_reg test_generalized_conditional_gradient",
            "test_smooth.py": "test_smooth_ot_dual test_smooth_ot_semi_dual",
            "test_stochastic.py": "test_dual_sgd_sinkhorn test_sag_asgd_sinkhorn",
        },
        expected=250,
    ),
    Source(
        name="pot-0.9.4.tar.gz",
        folder="24/59/b0f0135cfdc2f211e95e93143d4b14c02dab7e3a3ef149882712d6e467cc",
        sha256="4cf8b46bf4992c37529161c32dd5e3334e0c089399142f08ed6d455b57015edd",
        tests={
            "test_unbalanced.py": """
                test_implemented_methods test_sinkhorn_unbalanced2 test_stabilized_vs_sinkhorn
                test_unbalanced_convergence test_unbalanced_multiple_inputs test_unbalanced_relaxation_parameters
                test_unbalanced_warmstart test_wrong_method
            """,
        },
        expected=72,
    ),
)


def archive(source: Source, given: list[Path], cache: Path | None) -> Path:
    """Return the source distribution, from the arguments or the cache; download it only where a cache was named."""
    candidates = [path for path in given if path.name == source.name]
    if cache is not None:
        target = cache / source.name
        if not candidates and not target.exists():
            cache.mkdir(parents=True, exist_ok=True)
            partial = target.with_suffix(".part")
            urllib.request.urlretrieve(f"{INDEX}/{source.folder}/{source.name}", partial)
            partial.rename(target)
        candidates.append(target)
    if not candidates:
        sys.exit(f"run_pot: {source.name} was not given. Pass its path, or --download DIR to fetch it from {INDEX}.")
    digest = hashlib.sha256(candidates[0].read_bytes()).hexdigest()
    if digest != source.sha256:
        sys.exit(f"run_pot: {candidates[0]} has sha256 {digest}, expected {source.sha256}. Fetch it again.")
    return candidates[0]


def run(source: Source, path: Path, mode: str) -> tuple[int, list[str]]:
    """Run the tests of one distribution: (how many that called our functions passed, what did not pass)."""
    with tempfile.TemporaryDirectory(prefix="pot-tests-") as folder:
        with tarfile.open(path) as tar:
            for name in source.tests:
                member = tar.extractfile(f"{source.name.removesuffix('.tar.gz')}/test/{name}")
                if member is None:
                    sys.exit(f"run_pot: {path} has no test/{name}.")
                (Path(folder) / name).write_bytes(member.read())
        record = Path(folder) / "record.json"
        tests = " ".join(source.tests.values())
        environment = {**os.environ, "POT_MODE": mode, "POT_RECORD": str(record), "POT_TESTS": tests}
        places = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, places))
        options = ["-p", "pot_plugin", "-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", folder, "-q"]
        command = [sys.executable, "-m", "pytest", *options, "--disable-warnings", *source.tests]
        if mode == "wrong":
            command.append("--tb=no")
        subprocess.run(command, cwd=folder, env=environment, check=False)
        if not record.exists():
            sys.exit(f"run_pot: pytest stopped before it ran the tests of {source.name}; see above.")
        result = json.loads(record.read_text())
    reached, outcomes = result["calls"], result["outcomes"]
    passed = sum(outcomes.get(test) == "passed" for test in reached)
    return passed, [f"{source.name} {test}" for test, outcome in outcomes.items() if outcome != "passed"]


def main() -> int:
    """Report, and return 0 only when every expected test called our functions and passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archives", nargs="*", type=Path, help="POT's source distributions")
    parser.add_argument("--download", type=Path, metavar="DIR", help="fetch missing distributions into this folder")
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--control", dest="mode", action="store_const", const="wrong", help="wrong results must fail")
    modes.add_argument("--peer", dest="mode", action="store_const", const="pot", help="POT's own functions")
    parser.set_defaults(mode="ours")
    args = parser.parse_args()

    paths = [archive(source, args.archives, args.download) for source in SOURCES]
    results = [run(source, path, args.mode) for source, path in zip(SOURCES, paths, strict=True)]
    passed = sum(n for n, _ in results)
    failed = [test for _, tests in results for test in tests]
    expected = sum(source.expected for source in SOURCES)
    if args.mode == "wrong":
        print(f"control: {len(failed)} of {expected} upstream tests notice that every second result is wrong.")
        return 0 if len(failed) > expected // 4 else 1
    for test in failed:
        print(f"did not pass: {test}")
    whose = "POT's" if args.mode == "pot" else "our"
    if failed or passed < expected:
        print(f"{passed} of {expected} expected upstream tests reached {whose} functions and passed.")
        return 1
    print(f"{passed} upstream tests reached {whose} functions, all passed.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
