"""The path from student to teacher: what is known of a point on it, and where KL = target.

p = student, q = teacher, mu ~ p^(1-β) q^β, r = log q - log p, centered so that E_p r = 0; natural
logarithms. A point knows the KL and the first moments of r. From two points, the ends of a bracket
of β, `predict` says where between them the KL has a given value.

Shapes: M rows (prefixes), J candidates per row, F fields of a `Point`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

# Keeps logarithms of a variance finite.
LEAST_VARIANCE = 1e-290
# e^x of a float64 is finite up to x = 709; below this, so is its product with a few others.
_MAX_EXPONENT = 600
# A predicted path fits if its KL rises as the KL of both ends says, within a factor of e^0.5.
_MAX_LOG_MISFIT = 0.5
# Share of the mass below which the high end of a bracket has left the low end's ids behind.
_LEFT_BEHIND = 1e-5
# Keeps the log-odds of a share finite.
_LEAST_SHARE = 1e-12
_NUM_GRID_POINTS = 8
_NUM_NEWTON_STEPS = 2

# Gauss-Radau quadrature on [0, 1] with five nodes, of which the last is 1.
_NODES = (0.05710419611451768, 0.27684301363812383, 0.5835904323689168, 0.8602401356562195, 1.0)
_WEIGHTS = (
    *(0.14371356079122594, 0.28135601514946206, 0.31182652297574126, 0.22310390108357075),
    0.04,
)


class Point(NamedTuple):
    """The blend at one β per row; each field is [M] (or [M, J]) float64, packed they are [F, M].

    r is centered here: E_p r = 0.
    """

    blend_coef: Tensor
    kl: Tensor  # KL(mu||p)
    log_partition: Tensor  # A(β) = log E_p e^(βr)
    mean: Tensor  # A' = E_mu r
    log_variance: Tensor  # log A'' = log Var_mu r
    growth: Tensor  # its derivative: the third central moment over the variance

    @property
    def variance(self) -> Tensor:
        return self.log_variance.exp()

    def step_to(self, target: Tensor, max_ratio: Tensor) -> tuple[Tensor, Tensor]:
        """The step in β to KL = target by the second-order Taylor expansion, and a bound on the
        error of the KL there; not a number, or infinite, where there is none.

        KL' = βv and KL'' = v + βk3; the third derivative is 2 k3 + βk4. With D = 2 max |r|, no
        value of r is farther than D from its mean, so |k3| <= Dv, |k4| <= D²v, and v grows at
        most by e^(D |step|).
        """
        variance, gap = self.variance, target - self.kl
        slope, curvature = (
            self.blend_coef * variance,
            variance * (1 + self.blend_coef * self.growth),
        )
        step = gap / slope
        for _ in range(2):
            step = gap / (slope + curvature / 2 * step)
        spread, size = 2 * max_ratio, step.abs()
        third = spread * (2 + self.blend_coef * spread) * variance * (spread * size).exp()
        return step, third * size**3 / 6

    def moved_to(self, blend_coef: Tensor) -> "Point":
        """The point at a β near by: KL and log_partition by Taylor expansion, the rest as here."""
        step, variance = blend_coef - self.blend_coef, self.variance
        third = variance * self.growth
        slope, curvature = self.blend_coef * variance, variance + self.blend_coef * third
        return self._replace(
            blend_coef=blend_coef,
            kl=self.kl + step * (slope + step * curvature / 2),
            log_partition=self.log_partition
            + step * (self.mean + step * (variance / 2 + step * third / 6)),
        )


class KLPath:
    """KL(mu||p) over u in [0, 1], which is β from low to high: the integral of β Var_mu r.

    The logarithm of that variance is smooth: constant where r is normally distributed, linear
    where rare ids take over. Here it is the cubic that has its values and slopes at both ends
    (Hermite), or where `is_straight`, the line that has those of the low end.
    """

    def __init__(self, low: Point, high: Point) -> None:
        width_M = high.blend_coef - low.blend_coef
        rise_M = high.log_variance - low.log_variance
        slope_low_M, slope_high_M = low.growth * width_M, high.growth * width_M
        self.low_M1, self.width_M1 = low.blend_coef[:, None], width_M[:, None]
        # With the width, because dKL/du = width * dKL/db.
        self.value_M1 = (low.log_variance + width_M.log())[:, None]
        self.slope_M1 = slope_low_M[:, None]
        self.bend_M1 = (3 * rise_M - 2 * slope_low_M - slope_high_M)[:, None]
        self.twist_M1 = (slope_low_M + slope_high_M - 2 * rise_M)[:, None]
        self.nodes_5 = torch.tensor(_NODES, dtype=torch.float64, device=rise_M.device)
        self.weights_5 = torch.tensor(_WEIGHTS, dtype=torch.float64, device=rise_M.device)

    def straighten(self, is_straight_M: Tensor) -> None:
        self.bend_M1 = self.bend_M1.masked_fill(is_straight_M[:, None], 0.0)
        self.twist_M1 = self.twist_M1.masked_fill(is_straight_M[:, None], 0.0)

    def change(self, start_M: Tensor, stop_M: Tensor) -> tuple[Tensor, Tensor]:
        """KL at u = stop minus KL at u = start, and dKL/du at the stop, [M]."""
        span_M = stop_M - start_M
        u_M5 = torch.addcmul(start_M[:, None], span_M[:, None], self.nodes_5)
        log_M5 = torch.addcmul(self.bend_M1, self.twist_M1, u_M5)
        log_M5 = torch.addcmul(self.slope_M1, log_M5, u_M5)
        log_M5 = torch.addcmul(self.value_M1, log_M5, u_M5)
        slope_M5 = log_M5.clamp_(-_MAX_EXPONENT, _MAX_EXPONENT).exp_()
        slope_M5 *= torch.addcmul(self.low_M1, self.width_M1, u_M5)
        return span_M * (slope_M5 @ self.weights_5), slope_M5[:, -1]


def predict(ends_FM2: Tensor, target_M: Tensor) -> Tensor:
    """Where in the bracket KL = target, judged by both ends: [M, 2], the better one first.

    Newton along `KLPath`. Where that does not have the KL of both ends, the blend goes from one
    set of ids to another between them. There the first prediction follows the low end's straight
    line, or, when that comes first, `_switch`, which is the second.
    """
    low, high = (Point(*end_FM) for end_FM in ends_FM2.unbind(dim=-1))
    path = KLPath(low, high)
    zeros_M = torch.zeros_like(target_M)
    rise_M, _ = path.change(zeros_M, zeros_M + 1)
    # Not a number: no fit.
    fits_M = (rise_M / (high.kl - low.kl)).log().abs() < _MAX_LOG_MISFIT
    path.straighten(~fits_M)
    # The path is followed from the end with the nearer KL.
    from_high_M = fits_M & (2 * target_M.sqrt() > low.kl.sqrt() + high.kl.sqrt())
    start_FM = torch.where(from_high_M, ends_FM2[..., 1], ends_FM2[..., 0])
    start, start_u_M = Point(*start_FM), from_high_M.double()
    width_M = high.blend_coef - low.blend_coef
    # As if the variance were constant.
    square_M = start.blend_coef.square() + 2 * (target_M - start.kl) / start.variance
    blend_coef_M = square_M.clamp_min_(0).sqrt_()
    for _ in range(_NUM_NEWTON_STEPS):
        u_M = ((blend_coef_M - low.blend_coef) / width_M).nan_to_num_(nan=0.5).clamp_(0, 1)
        blend_coef_M = torch.addcmul(low.blend_coef, u_M, width_M)
        change_M, slope_M = path.change(start_u_M, u_M)
        kl_M = (start.kl + change_M).clamp_min_(LEAST_VARIANCE)
        # Newton on log KL as a function of log β: a line near the student, where KL ~ β².
        exponent_M = (target_M / kl_M).log_() * kl_M * width_M / (blend_coef_M * slope_M)
        blend_coef_M = blend_coef_M * exponent_M.clamp_(-_MAX_EXPONENT, _MAX_EXPONENT).exp_()
    switch_M = _switch(low, high, target_M)
    is_switch_M = ~fits_M & (switch_M > low.blend_coef) & (switch_M < blend_coef_M)
    return torch.stack((torch.where(is_switch_M, switch_M, blend_coef_M), switch_M), dim=-1)


def _switch(low: Point, high: Point, target_M: Tensor) -> Tensor:
    """β where KL = target if the blend mixes two points of r, one of which is the low end, [M].

    The log-odds of the other are linear in β, with slope `gap`. The high end gives a point of that
    line by its variance, or, if it is past the switch, the tangents of log_partition at both ends,
    which meet in the middle of it.
    """
    rise_M, variance_M = high.mean - low.mean, high.variance
    is_past_M = variance_M < _LEFT_BEHIND * rise_M.square()
    gap_M = torch.where(is_past_M, rise_M, rise_M + variance_M / rise_M)
    blend_coef_M = torch.where(is_past_M, (high.kl - low.kl) / rise_M, high.blend_coef)
    log_odds_M = torch.where(is_past_M, 0.0, (rise_M.square() / variance_M).log())
    share_M = (target_M - low.kl) / (blend_coef_M * gap_M - 1)
    return blend_coef_M + (share_M.logit(eps=_LEAST_SHARE) - log_odds_M) / gap_M


def grid(blend_coef_M2: Tensor) -> Tensor:
    """Evenly spaced points of the bracket, [M, J]."""
    fractions_J = torch.arange(1, _NUM_GRID_POINTS + 1, device=blend_coef_M2.device).double()
    return torch.lerp(
        blend_coef_M2[:, :1], blend_coef_M2[:, 1:], fractions_J / (_NUM_GRID_POINTS + 1)
    )


def round_between(blend_coef_M2: Tensor, candidates_MJ: Tensor) -> Tensor:
    """Round candidates to fp32 numbers inside the bracket; those outside become its middle.

    The result is stated in fp32, so that is where the KL has to be known. A step that rounds to an
    end of the bracket becomes that end's neighbor.
    """
    low_M1, high_M1 = blend_coef_M2[:, :1], blend_coef_M2[:, 1:]
    is_inside_MJ = (candidates_MJ > low_M1) & (candidates_MJ < high_M1)
    rounded_MJ = torch.where(is_inside_MJ, candidates_MJ, (low_M1 + high_M1) / 2).float()
    low_M1, high_M1 = low_M1.float(), high_M1.float()
    least_M1, most_M1 = low_M1.nextafter(high_M1), high_M1.nextafter(low_M1)
    return rounded_MJ.clamp(least_M1, most_M1).double()


def round_down(blend_coef_M: Tensor) -> Tensor:
    """The largest fp32 number that is not above."""
    rounded_M = blend_coef_M.float()
    below_M = rounded_M.nextafter(torch.zeros_like(rounded_M))
    return torch.where(rounded_M.double() > blend_coef_M, below_M, rounded_M).double()
