"""``python -m hdet.bench.hyperparameters``: does hdet find the optimum of other hyperparameters?

200 labelled digits, a fifth of the labels wrong (for the learning rates: 900, all of them right); an MLP with dropout;
AdamW, 3000 steps; 4 processes, averaged every 20 steps. Another 400 images are the probe's; the rest validate. Weight
decay and learning rates are explored under shared gradients, so that replicas differ in nothing else; dropout and label
smoothing, which act through the gradient, under local ones. For every hyperparameter:

- **swept**: what each of a few fixed values ends at, all else at the start's values. The best is the optimum.
- **found**: from a start away from it, moved by hdet, alone and with all others at once.

Weight decay and dropout start too low, label smoothing too high, the learning rates of body and head 100 times too low.
Resumes: every run is kept in ``hyperparameters.jsonl``.
"""
