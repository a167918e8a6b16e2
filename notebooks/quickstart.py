# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # How probable is a trained network?
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/volumejax/volumejax/blob/main/notebooks/quickstart.ipynb)
#
# Draw the weights of a network at random. What are the chances that it behaves like one that was
# trained? This notebook asks that of a small digit classifier, with the experiment of Scherlis &
# Belrose, [arXiv 2501.18812](https://arxiv.org/abs/2501.18812). It takes a minute or two on a
# laptop; no GPU is needed.

# %%
import importlib.util

if importlib.util.find_spec("volumejax") is None:
    # %pip install -q 'volumejax[run]'
    importlib.invalidate_caches()

# %% [markdown]
# ## A trained network
#
# A 64-64-10 perceptron learns 1,024 of scikit-learn's handwritten digits with Adam. The trained
# weights $\theta_0$ are the **anchor**: everything below is measured around them.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import volumejax as vj
from volumejax.tasks.digits import digits_task

task = digits_task(seed=0)
dimension = sum(leaf.size for leaf in jax.tree.leaves(task.params))
print(f"{dimension:,} parameters with root mean square {task.rms:.3f}")
print(f"accuracy {task.train_accuracy:.3f} on the training digits, {task.test_accuracy:.3f} on the others")

# %% [markdown]
# ## The question
#
# *Behaves like the anchor* means: the output probabilities hardly change. The **cost** $C(\theta)$
# is the mean Kullback–Leibler divergence from the anchor's outputs to those of $\theta$, in nats
# per digit; the region is where it is at most the **cutoff** $\epsilon$ = 0.01. *At random* means:
# drawn from the **prior**, here the paper's $N(0, 1.3975^2)$ on every weight, which is the prior
# that the training's weight decay corresponds to.
#
# Some perturbations of the anchor, to get a feeling for 0.01 nats:

# %%
cost, cutoff = task.cost, 1e-2
prior = vj.Gaussian(sigma=1.3975)

anchor_classes = jnp.argmax(task.apply_fn(task.params, task.inputs), axis=-1)
changed = vj.error_rate(task.apply_fn, task.inputs, anchor_classes)
noise = vj.Gaussian(sigma=1.0).sample(jax.random.key(1), task.params)


def perturbed(size):
    return jax.tree.map(lambda x, z: x + size * z, task.params, noise)


for size in (0.0, 0.01, 0.03, 0.1, 0.3, 1.0):
    kl, share = cost(perturbed(size)), changed(perturbed(size))
    print(f"noise {size:4.2f} on every weight: KL {kl:7.4f} nats, {share:5.1%} of the digits read differently")

# %% [markdown]
# ## Rays
#
# Shoot a ray from the anchor in a random direction, find the radius at which the cost first exceeds
# the cutoff, and integrate the prior along the ray up to there. The average of that integral over
# directions is the probability of the region, or at least of its part that can be seen from the
# anchor along straight lines, the **star** region.


# %%
def shoot(proposal, seed=0):
    key = jax.random.key(seed)
    return vj.ray_volume(key, cost, task.params, prior, cutoff=cutoff, proposal=proposal, num_rays=128)


naive = shoot(vj.Isotropic())
print(naive.summary())

# %% [markdown]
# ## Why this is only a lower bound
#
# The rays differ from one another by hundreds of nats. An average of $e^{\text{log weight}}$ over
# them is then nothing but its largest term, and another key has another largest term:

# %%
for seed in (0, 1, 2):
    estimate = shoot(vj.Isotropic(), seed)
    largest = np.sort(estimate.trace.log_weight)[::-1]
    share = np.exp(largest[0] - np.logaddexp.reduce(largest))
    print(f"key {seed}: log mean weight {estimate.log_mass:.0f}; largest log weights {np.round(largest[:3])}")
    print(f"       the first of them carries {share:.3%} of the sum, and k-hat is {estimate.pareto_k:.2f}")

# %% [markdown]
# The tail diagnostic k-hat sees that. So `std_error` is infinite, `kind` says `LOWER_BOUND`, and
# what remains is what can be proved: by Markov's inequality a mean of non-negative weights rarely
# exceeds its expectation by much, and `lower` holds with 95 % confidence whatever the distribution
# of the weights. The truth may lie thousands of nats higher.
#
# ## Better directions, for free
#
# Rays should go where the region is long. The optimizer knows: a weight whose gradients were small
# can move far. Adam's second moment $\nu$, taken from the optax state, gives directions with
# standard deviations $1/(\sqrt\nu + 0.001)$. The weights are divided by the density of the
# directions, so that the target stays the same.

# %%
adam = shoot(vj.damped_proposal(vj.second_moments(task.opt_state, task.params), task.params, damping=1e-3))
print(adam.summary())

# %% [markdown]
# ## Better directions, from the curvature
#
# The Gauss–Newton matrix $H$ is the Hessian of the cost at the anchor. The Gaussian approximation
# of the **tempered posterior** $\pi(\theta)\, e^{-\beta C(\theta)}$ has precision $\beta H +
# \sigma^{-2}$; here only the diagonal of $H$ is used. With `cutoff=` instead of `beta=` the library
# solves for the $\beta$ at which a quadratic cost would match the region (about 170,000 here), but
# this cost is not quadratic that far out. So $\beta$ is tuned: on pilot rays with a key of their
# own, by their mean log weight and never by the maximum, and the result comes from fresh rays.

# %%
ggn = vj.diagonal_ggn(task.apply_fn, task.params, task.inputs)


def tempered_posterior(beta):
    return vj.curvature_proposal(ggn, task.params, prior, beta=beta, shift=False)


pilots = {beta: shoot(tempered_posterior(beta), seed=1) for beta in (2e3, 6e3, 2e4, 6e4, 2e5)}
for beta, pilot in pilots.items():
    print(f"beta {beta:9,.0f}: log weight {pilot.mean_log_weight:9.1f} ± {pilot.std_log_weight:.0f}")
best = max(pilots, key=lambda beta: pilots[beta].mean_log_weight)
tempered = shoot(tempered_posterior(best))
print(tempered.summary())

# %% [markdown]
# ## Compare distributions
#
# All three measure one number, the log mass of the star region. The mean of every histogram lies
# below it (Jensen's inequality), so the further right, the closer. The vertical lines mark what is
# proved.

# %%
results = {"isotropic": naive, "Adam's second moment": adam, "diagonal GGN, tempered": tempered}
figure, axis = plt.subplots(figsize=(7, 2.6), dpi=80)
for (name, estimate), colour in zip(results.items(), ("#7f8790", "#0072b2", "#d55e00"), strict=True):
    label = f"{name}: log mass ≥ {np.floor(estimate.lower):,.0f}"
    axis.hist(estimate.trace.log_weight, bins=24, color=colour, alpha=0.55, label=label)
    axis.axvline(estimate.lower, color=colour, lw=2)
axis.set(xlabel="log weight of a ray (nats)", ylabel="rays", ylim=(0, 32))
axis.legend(fontsize=8, loc="upper left")
axis.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# ## How many bits is a network?
#
# The negative logarithm of the probability is the network's information content: what it takes to
# tell someone who knows the prior which behaviour was found. A lower bound on the mass is an upper
# bound on the bits.

# %%
for name, estimate in results.items():
    bits = -estimate.lower / np.log(2)
    print(f"{name}: at most {bits:,.0f} bits, {bits / dimension:.1f} per parameter (stored in 32)")

# %% [markdown]
# ## A problem with a known answer, inside `jit` and `vmap`
#
# Why believe any of this? Here the cost is quadratic, the exact log mass is known, and the
# directions fit the region: now there is an error bar, and the truth lies within it.
#
# `ray_volume` is a pure function of arrays, so it may be called in a compiled training step or
# mapped over anything: here over four cutoffs, with a proposal for each.

# %%
from volumejax.reference import quadratic

problems = [quadratic(1 / np.arange(1, 21), cutoff=cutoff) for cutoff in (1e-3, 1e-2, 1e-1, 1.0)]
proposals = [vj.curvature_proposal(p.curvature, p.params, p.prior, cutoff=p.cutoff) for p in problems]


@jax.jit
def volumes(params, cutoffs, proposals):
    def volume(cutoff, proposal):
        key, problem = jax.random.key(0), problems[0]
        return vj.ray_volume(key, problem.cost, params, problem.prior, cutoff=cutoff, proposal=proposal, num_rays=256)

    return jax.vmap(volume)(cutoffs, proposals)


cutoffs = jnp.array([p.cutoff for p in problems])
stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *proposals)
estimates = volumes(problems[0].params, cutoffs, stacked)
for problem, log_mass, error in zip(problems, estimates.log_mass, estimates.std_error, strict=True):
    print(f"cutoff {problem.cutoff:5.3f}: exact {problem.log_mass:9.4f}, estimate {log_mass:9.4f} ± {error:.4f}")

# %% [markdown]
# ## Where next
#
# - Your own network: `vj.kl_to_anchor(apply_fn, params, inputs)` takes any JAX model; `cost` may be
#   any scalar function of the parameters that is small at the anchor.
# - `volumejax run configs/digits_mlp.yaml` repeats the experiment with more proposals, the dense
#   Gauss–Newton matrix among them, and writes a report.
# - `volumejax check` runs more problems with known answers on your machine.
# - [Mathematics](../docs/mathematics.md): the integrals, the search for the boundary, and what may
#   be called a bound.
