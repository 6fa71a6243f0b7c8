"""Shared by the study: workloads with lengths, weight matrices' movement, cached runs."""
import json, math, os, sys, time
from dataclasses import dataclass, replace
from pathlib import Path
import torch
torch.set_num_threads(1)
from hdet.bench.regret import peers, simulation as S
from hdet.bench.regret.workloads import WORKLOADS, workload_of
from hdet.controller import TwoSlope, slopes_of
import new_workloads
CACHE = Path("runs")
def wl(spec):
    """name[/schedule][*length]"""
    n, _, L = spec.partition("*")
    w = workload_of(n)
    return replace(w, steps=max(1, round(w.steps * float(L or 1))))
import hashlib
def half(spec):
    """'train' or 'test', by the name alone; a longer run goes with its workload."""
    name = spec.partition("*")[0].partition("/")[0]
    if name == "masked_lm": return "train"  # it had a say in that evidence argues for more only
    return "train" if hashlib.sha256(name.encode()).digest()[0] % 2 else "test"
CHEAP = "digits_mlp,digits_conv,regression,recommender,batch_norm,dropout,autoencoder,denoiser,photo,friedman,mixture,logistic,snippets,tumours".split(",")
LMS = "char_lm,fine_tune,vision_transformer,gpt,masked_lm,gru".split(",")
