"""Learning coefficients of deep linear networks by adjusted chains, against Aoyagi's exact values.

At each row two temperatures, β = 1e5 and 1e8, under a standard normal prior, and λ from the two where m > 1.
"""

import argparse
import time

import jax

import volumejax as vj
from volumejax import reference

ROWS = [
    ([5, 3, 5], 0), ([5, 3, 5], 1), ([5, 3, 5], 2), ([5, 3, 5], 3), ([5, 4, 5], 0), ([5, 4, 5], 4), ([4, 3, 8], 0),
    ([4, 3, 8], 3), ([8, 3, 4], 0), ([8, 3, 4], 3), ([3, 3, 3, 3], 0), ([3, 3, 3, 3], 3), ([4, 4, 4, 4, 4], 0),
    ([10, 10, 10], 5), ([20, 10, 20, 10, 20], 3),
]  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chains", type=int, default=32)
    parser.add_argument("--draws", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    chains, draws, seed = vars(parser.parse_args()).values()
    sampler = vj.Hamiltonian(num_chains=chains, num_draws=draws)
    print("| widths | rank | λ (m) | β = 1e5 | β = 1e8 | both | R-hat | seconds |")
    print("|---|---|---|---|---|---|---|---|")
    for widths, rank in ROWS:
        problem = reference.deep_linear(widths, rank)
        began = time.perf_counter()
        hot, cold = (
            vj.learning_coefficient(
                jax.random.key(2 * seed + i), problem.cost, problem.params, vj.Gaussian(1.0), beta=beta, sampler=sampler
            )
            for i, beta in enumerate((1e5, 1e8))
        )
        seconds = time.perf_counter() - began
        joined = cold.without_logarithm(hot)
        both = f"{float(joined.value):.2f} ± {float(joined.std_error):.2f}" if problem.multiplicity > 1 else "–"
        print(
            f"| {'-'.join(map(str, widths))} | {rank} | {problem.learning_coefficient:g} ({problem.multiplicity}) | "
            f"{float(hot.value):.3f} ± {float(hot.std_error):.3f} | {float(cold.value):.3f} ± "
            f"{float(cold.std_error):.3f} | {both} | {float(max(hot.r_hat, cold.r_hat)):.3f} | {seconds:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
