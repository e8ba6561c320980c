"""nn.LSTM, nn.GRU and nn.RNN, and their cells, taken apart into linear maps, one for each step.

They reach a function mode as one call of all layers, directions and steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from cl_optim.fisher.rules.registry import TAKEN_APART, UnsupportedUseError

State: TypeAlias = tuple[Tensor, ...]  # (h,), or of an LSTM (h, c)
# From what the input gives to the gates, the state and what maps it: the next state.
Step: TypeAlias = Callable[[Tensor, State, Tensor, Tensor | None], State]


def _lstm_step(gates: Tensor, state: State, w_hh: Tensor, b_hh: Tensor | None) -> State:
    h, c = state
    i, f, g, o = (gates + F.linear(h, w_hh, b_hh)).chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru_step(gates: Tensor, state: State, w_hh: Tensor, b_hh: Tensor | None) -> State:
    (h,) = state
    r, z, n = gates.chunk(3, -1)
    r_h, z_h, n_h = F.linear(h, w_hh, b_hh).chunk(3, -1)
    z = (z + z_h).sigmoid()
    n = (n + (r + r_h).sigmoid() * n_h).tanh()
    return (n + z * (h - n),)


def _tanh_step(gates: Tensor, state: State, w_hh: Tensor, b_hh: Tensor | None) -> State:
    return ((gates + F.linear(state[0], w_hh, b_hh)).tanh(),)


def _relu_step(gates: Tensor, state: State, w_hh: Tensor, b_hh: Tensor | None) -> State:
    return ((gates + F.linear(state[0], w_hh, b_hh)).relu(),)


def _network(step: Step) -> Callable[..., tuple[Tensor, ...]]:
    """Return what an nn.LSTM, nn.GRU or nn.RNN calls, with that step."""

    def network(
        input: Tensor,
        hx: Any,
        params: Sequence[Tensor],
        has_biases: bool | Sequence[Tensor],
        num_layers: int | bool,
        dropout: float | int,
        train: bool | float,
        bidirectional: bool,
        batch_first: bool | None = None,
    ) -> tuple[Tensor, ...]:
        if batch_first is None or not isinstance(has_biases, bool):
            raise UnsupportedUseError("a PackedSequence is not supported; pad it instead")
        states = tuple(hx) if isinstance(hx, (tuple, list)) else (hx,)
        x = input if batch_first else input.transpose(0, 1)  # [N, T, in]
        directions = 2 if bidirectional else 1
        each = len(params) // (num_layers * directions)
        if each not in (2, 4):
            raise UnsupportedUseError("proj_size is not supported")
        if each != (4 if has_biases else 2):
            raise UnsupportedUseError("its weights do not fit its layers")
        last = []
        for layer in range(num_layers):
            outputs = []
            for direction in range(directions):
                index = layer * directions + direction
                weights = params[each * index : each * (index + 1)]
                state = tuple(one[index] for one in states)
                output, state = _direction(step, x, state, weights, reverse=direction == 1)
                outputs.append(output)
                last.append(state)
            x = outputs[0] if directions == 1 else torch.cat(outputs, -1)
            if dropout and train and layer + 1 < num_layers:
                x = F.dropout(x, float(dropout))
        final = tuple(torch.stack(parts) for parts in zip(*last, strict=True))
        return (x if batch_first else x.transpose(0, 1), *final)

    return network


def _direction(
    step: Step, x: Tensor, state: State, weights: Sequence[Tensor], reverse: bool
) -> tuple[Tensor, State]:
    """Run one layer in one direction: return its outputs [N, T, hidden] and its last state."""
    w_ih, w_hh, *biases = weights
    b_ih, b_hh = biases or (None, None)
    if w_hh.shape[1] != state[0].shape[-1]:
        raise UnsupportedUseError("proj_size is not supported")
    gates = F.linear(x, w_ih, b_ih).unbind(1)
    outputs = []
    for gate in reversed(gates) if reverse else gates:
        state = step(gate, state, w_hh, b_hh)
        outputs.append(state[0])
    if reverse:
        outputs.reverse()
    return torch.stack(outputs, 1), state


def _cell(step: Step) -> Callable[..., Any]:
    """Return what an nn.LSTMCell, nn.GRUCell or nn.RNNCell calls, with that step."""

    def cell(
        input: Tensor,
        hx: Any,
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor | None = None,
        b_hh: Tensor | None = None,
    ) -> Any:
        states = tuple(hx) if isinstance(hx, (tuple, list)) else (hx,)
        state = step(F.linear(input, w_ih, b_ih), states, w_hh, b_hh)
        return state if isinstance(hx, (tuple, list)) else state[0]

    return cell


TAKEN_APART.update(
    {
        torch.lstm: _network(_lstm_step),
        torch.gru: _network(_gru_step),
        torch.rnn_tanh: _network(_tanh_step),
        torch.rnn_relu: _network(_relu_step),
        torch.lstm_cell: _cell(_lstm_step),
        torch.gru_cell: _cell(_gru_step),
        torch.rnn_tanh_cell: _cell(_tanh_step),
        torch.rnn_relu_cell: _cell(_relu_step),
    }
)
