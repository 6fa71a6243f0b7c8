"""The controllers of learning rates that there are."""

from hdet.steer.published import Published
from hdet.steer.two_slope import TwoSlope

Controller = Published | TwoSlope
