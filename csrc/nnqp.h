// min 1/2 v'Qv + c'v subject to v >= lower, Q = GG' symmetric positive semidefinite and perhaps
// singular: the dual problem of GEM (Lopez-Paz & Ranzato 2017, eq. 11). One small dense problem is
// solved by one team of threads: a single lane on the CPU, a warp or a block on the GPU.
//
// Dual active set (Goldfarb & Idnani 1983): beginning with no active row, the most violated row
// enters, and on its way pushes out the active rows whose x falls to 0; the objective falls in
// every step, so no active set comes back. All of it is read from a sweep tableau (Goodnight
// 1979), one symmetric matrix that holds
//
//   A = active rows, N = the others     S_AA = -Q_AA^-1    S_AN = Q_AA^-1 Q_AN
//                                       S_NN = Q_NN - Q_NA Q_AA^-1 Q_AN
//   and beside it                       r_A = Q_AA^-1 c_A = -x_A
//                                       r_N = c_N - Q_NA Q_AA^-1 c_A = w_N
//
// so that a row enters or leaves by the same symmetric update of rank one. A row whose Schur pivot
// S_kk is rounding is blocked while the active set stays: no regularisation is needed. At the end
// the support is solved anew by Cholesky with refinement, and the result judged by w = Qx + c.
//
// In here, x = (v - lower) / scale >= 0, and rows are scaled by powers of two near their norms'
// reciprocals, which rounds nothing.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

#include "float_types.h"

#ifdef __CUDACC__
#define CL_OPTIM_TEAM __device__ __forceinline__
#else
#define CL_OPTIM_TEAM inline __attribute__((always_inline))
#endif

namespace cl_optim {

constexpr int kMostNNQPRows = 1024;

enum class NNQPStatus : int8_t {
  solved = 0,
  dependent = 1,  // but for rows that were blocked
  inactive = 2,   // nothing is violated, v = 0 (only_violated)
  unconverged = -1,
  invalid = -2,
};

struct NNQPOptions {
  double lower;
  double tolerance;  // of w, relative to |c_i| + sum_j |Q_ij| v_j
  double threshold;  // of a Schur pivot, relative to the row's square
  bool only_violated;
  int max_pivots;  // before the fallback; 0 for a number that has always been enough
};

struct NNQPProblem {
  const double* gram;    // [size, size]
  const double* linear;  // [size]
  int size;
};

// What a team works in: the tableau in the upper triangle of rows of `stride` doubles, the Cholesky
// factor in the lower one, its diagonal beside it; then vectors and flags.
struct NNQPMemory {
  double* tableau;
  int stride;
  double* vectors;

  static constexpr int kVectors = 10;
  // Bytes of `vectors` for a problem: also the row numbers and the flags.
  CL_OPTIM_HD static constexpr size_t vector_bytes(int size) {
    return size * (kVectors * sizeof(double) + sizeof(int) + 2) + 16;
  }
};

// One thread that is a team of its own. Other teams offer the same:
//
// - rank, size: the thread among all of them;
// - row, rows, lane, lanes: the same threads as a grid; neighbouring lanes are for neighbours in
//   memory;
// - sync: waits for all, and makes their writes visible;
// - argmax: the index that comes with the largest value, the least of several; a thread without a
//   candidate gives the index -1;
// - any, sum: over all threads. Every thread gets the result, as from argmax.
struct SingleLane {
  CL_OPTIM_TEAM int rank() const { return 0; }
  CL_OPTIM_TEAM int size() const { return 1; }
  CL_OPTIM_TEAM int row() const { return 0; }
  CL_OPTIM_TEAM int rows() const { return 1; }
  CL_OPTIM_TEAM int lane() const { return 0; }
  CL_OPTIM_TEAM int lanes() const { return 1; }
  CL_OPTIM_TEAM void sync() const {}
  CL_OPTIM_TEAM int argmax(double, int index) const { return index; }
  CL_OPTIM_TEAM bool any(bool value) const { return value; }
  CL_OPTIM_TEAM double sum(double value) const { return value; }
};

template <typename Team>
class NNQPSolver {
 public:
  CL_OPTIM_TEAM NNQPSolver(const Team& team, const NNQPProblem& problem, const NNQPOptions& options,
                           const NNQPMemory& memory)
      : team_(team),
        gram_(problem.gram),
        linear_(problem.linear),
        size_(problem.size),
        options_(options),
        tableau_(memory.tableau),
        stride_(memory.stride) {
    double* vector = memory.vectors;
    for (double** which :
         {&scale_, &c_, &base_, &r_, &column_, &margin_, &x_, &w_, &diagonal_, &y_}) {
      *which = vector;
      vector += size_;
    }
    order_ = reinterpret_cast<int*>(vector);
    active_ = reinterpret_cast<int8_t*>(order_ + size_);
    blocked_ = active_ + size_;
  }

  // Solves the problem. `state`, if any, is what an earlier call left for the same Q, or zeros: the
  // tableau, [size, size], and a flag per row, kInactive or kActive. It is replaced by this call's.
  CL_OPTIM_TEAM void solve(double* v, int8_t* status_out, double* gap_out, double* state) {
    NNQPStatus status = run(state);
    const bool none = status == NNQPStatus::inactive;
    const bool invalid = status == NNQPStatus::invalid;
    double gap = 0.0;
    bool finite = true;
    for (int i = team_.rank(); i < size_; i += team_.size()) {
      v[i] = none ? 0.0 : invalid ? NAN : options_.lower + scale_[i] * x_[i];
      if (none || invalid) continue;
      gap += x_[i] * w_[i];
      finite = finite && std::isfinite(v[i]) && std::isfinite(margin_[i]);
    }
    gap = team_.sum(gap);
    // Beyond float64's range nothing is certified.
    if (team_.any(!finite) || !std::isfinite(gap)) {
      if (!none && !invalid) status = NNQPStatus::unconverged;
    }
    if (team_.rank() == 0) {
      *status_out = static_cast<int8_t>(status);
      *gap_out = invalid ? NAN : gap;
    }
    if (state != nullptr && !none && !invalid) save(state, status != NNQPStatus::unconverged);
  }

 private:
  static constexpr double kInactive = 1.0, kActive = 2.0;
  static constexpr int kIterations = 500;  // of the fallback

  CL_OPTIM_TEAM NNQPStatus run(const double* state) {
    bool finite = true, violated = false, valid = true;
    for (int i = team_.rank(); i < size_; i += team_.size()) {
      const double square = gram_[i * size_ + i];
      finite = finite && std::isfinite(linear_[i]);
      violated = violated || linear_[i] < 0.0;
      valid = valid && (square > 0.0 || (square == 0.0 && !(linear_[i] < 0.0)));
      for (int j = 0; j < size_; ++j) finite = finite && std::isfinite(gram_[j * size_ + i]);
    }
    if (team_.any(!finite)) return NNQPStatus::invalid;
    if (options_.only_violated && !team_.any(violated)) return NNQPStatus::inactive;
    if (team_.any(!valid)) return NNQPStatus::invalid;

    scale();
    const int usual_pivots = 8 * size_ + 20;
    pivots_left_ = options_.max_pivots > 0 ? options_.max_pivots : usual_pivots;
    if (state != nullptr && size_ > 0 && state[size_ * size_] != 0.0) {
      resume(state);
    } else {
      start();
    }
    bool converged = repair() && iterate();
    if (!converged) {
      guess();
      pivots_left_ = usual_pivots;
      converged = activate_ordered() && repair() && iterate();
    }
    if (!converged) {
      multiply();
      return NNQPStatus::unconverged;
    }
    return dependent_ ? NNQPStatus::dependent : NNQPStatus::solved;
  }

  // --- the problem, scaled ---------------------------------------------------------------------

  CL_OPTIM_TEAM double q(int j, int i) const {
    return scale_[j] * gram_[j * size_ + i] * scale_[i];
  }

  CL_OPTIM_TEAM void scale() {
    for (int i = team_.rank(); i < size_; i += team_.size()) {
      const double square = gram_[i * size_ + i];
      const int exponent = square > 0.0 ? std::ilogb(square) : 0;
      scale_[i] = std::ldexp(1.0, -((exponent + 1) >> 1));  // so that q(i, i) is in [0.5, 2)
    }
    team_.sync();
    for (int i = team_.rank(); i < size_; i += team_.size()) {
      c_[i] = scale_[i] * linear_[i];
      base_[i] = std::fabs(c_[i]);
    }
    if (options_.lower == 0.0) return team_.sync();
    for (int j = 0; j < size_; ++j) {
      const double shift = options_.lower / scale_[j];
      for (int i = team_.rank(); i < size_; i += team_.size()) {
        c_[i] += q(j, i) * shift;
        base_[i] += std::fabs(q(j, i)) * shift;
      }
    }
    team_.sync();
  }

  // w = Qx + c.
  CL_OPTIM_TEAM void multiply() {
    for (int i = team_.rank(); i < size_; i += team_.size()) w_[i] = c_[i];
    for (int j = 0; j < size_; ++j) {
      const double x = x_[j];
      if (x == 0.0) continue;
      for (int i = team_.rank(); i < size_; i += team_.size()) w_[i] += q(j, i) * x;
    }
    team_.sync();
  }

  // How far w_i may be below 0 by rounding.
  CL_OPTIM_TEAM void margins() {
    for (int i = team_.rank(); i < size_; i += team_.size()) margin_[i] = base_[i];
    for (int j = 0; j < size_; ++j) {
      const double x = x_[j];
      if (x == 0.0) continue;
      for (int i = team_.rank(); i < size_; i += team_.size()) {
        margin_[i] += std::fabs(q(j, i)) * x;
      }
    }
    for (int i = team_.rank(); i < size_; i += team_.size()) margin_[i] *= options_.tolerance;
    team_.sync();
  }

  // --- the tableau -----------------------------------------------------------------------------

  CL_OPTIM_TEAM double& entry(int i, int j) const {
    return i < j ? tableau_[i * stride_ + j] : tableau_[j * stride_ + i];
  }

  CL_OPTIM_TEAM void start() {
    for (int j = team_.row(); j < size_; j += team_.rows()) {
      for (int i = j + team_.lane(); i < size_; i += team_.lanes()) {
        tableau_[j * stride_ + i] = q(j, i);
      }
    }
    for (int i = team_.rank(); i < size_; i += team_.size()) {
      r_[i] = c_[i];
      active_[i] = blocked_[i] = 0;
    }
    team_.sync();
  }

  CL_OPTIM_TEAM void resume(const double* state) {
    for (int j = team_.row(); j < size_; j += team_.rows()) {
      for (int i = j + team_.lane(); i < size_; i += team_.lanes()) {
        tableau_[j * stride_ + i] = state[j * size_ + i];
      }
    }
    for (int i = team_.rank(); i < size_; i += team_.size()) {
      active_[i] = state[size_ * size_ + i] == kActive;
      blocked_[i] = 0;
      r_[i] = active_[i] ? 0.0 : c_[i];
    }
    team_.sync();
    for (int j = 0; j < size_; ++j) {
      if (!active_[j]) continue;
      for (int i = team_.rank(); i < size_; i += team_.size()) r_[i] -= entry(j, i) * c_[j];
    }
    team_.sync();
  }

  CL_OPTIM_TEAM void save(double* state, bool usable) {
    for (int j = team_.row(); j < size_; j += team_.rows()) {
      for (int i = j + team_.lane(); i < size_; i += team_.lanes()) {
        state[j * size_ + i] = tableau_[j * stride_ + i];
      }
    }
    for (int i = team_.rank(); i < size_; i += team_.size()) {
      state[size_ * size_ + i] = !usable ? 0.0 : active_[i] ? kActive : kInactive;
    }
  }

  // Row k enters the active set, or leaves it. False at the limit of pivots.
  CL_OPTIM_TEAM bool sweep(int k) {
    if (--pivots_left_ < 0) return false;
    const double pivot = entry(k, k);
    const double of_r = r_[k] / pivot;
    const double sign = active_[k] ? -1.0 : 1.0;
    for (int i = team_.rank(); i < size_; i += team_.size()) column_[i] = entry(i, k);
    team_.sync();
    for (int j = team_.row(); j < size_; j += team_.rows()) {
      if (j == k) continue;
      const double factor = column_[j] / pivot;
      double* row = tableau_ + j * stride_;
      for (int i = j + team_.lane(); i < size_; i += team_.lanes()) row[i] -= factor * column_[i];
    }
    team_.sync();
    for (int i = team_.rank(); i < size_; i += team_.size()) {
      if (i != k) r_[i] -= column_[i] * of_r;
      entry(i, k) = i == k ? -1.0 / pivot : sign * column_[i] / pivot;
      blocked_[i] = 0;
    }
    if (team_.rank() == 0) {
      r_[k] = sign * of_r;
      active_[k] = !active_[k];
    }
    team_.sync();
    return true;
  }

  CL_OPTIM_TEAM bool is_dependent(int k) const {
    return !(entry(k, k) > options_.threshold * q(k, k));
  }

  // Whether w of the row, violated as it is, may be 0 but for rounding: its own, and that of the
  // active rows' w, which should be 0, times the row's coefficients S_Ak in them.
  CL_OPTIM_TEAM bool is_rounding(int k) const {
    double noise = 0.0;
    for (int i = team_.rank(); i < size_; i += team_.size()) {
      if (active_[i]) noise += std::fabs(entry(i, k)) * margin_[i];
    }
    return !(r_[k] < -(margin_[k] + team_.sum(noise)));
  }

  // The rows leave whose x is negative, which a resumed tableau or rounding may have.
  CL_OPTIM_TEAM bool repair() {
    while (true) {
      double lowest = 0.0;
      int leaving = -1;
      for (int i = team_.rank(); i < size_; i += team_.size()) {
        if (active_[i] && r_[i] > lowest) {
          lowest = r_[i];
          leaving = i;
        }
      }
      leaving = team_.argmax(lowest, leaving);
      if (leaving < 0) return true;
      if (!sweep(leaving)) return false;
    }
  }

  // --- the active-set method -------------------------------------------------------------------

  CL_OPTIM_TEAM bool iterate() {
    while (true) {
      const int row = most_violated();
      if (row < 0) {
        if (finish()) return true;
        if (pivots_left_ <= 0 || !repair()) return false;
      } else if (is_dependent(row) || is_rounding(row)) {
        block(row);
      } else if (!enter(row)) {
        return false;
      }
    }
  }

  // The row whose product with the projection is the most negative for its norm; -1 for none.
  CL_OPTIM_TEAM int most_violated() {
    for (int i = team_.rank(); i < size_; i += team_.size()) x_[i] = active_[i] ? -r_[i] : 0.0;
    team_.sync();
    margins();
    double worst = 0.0;
    int row = -1;
    for (int i = team_.rank(); i < size_; i += team_.size()) {
      if (active_[i] || blocked_[i] || !(r_[i] < -margin_[i])) continue;
      const double violation = r_[i] * r_[i] / q(i, i);
      if (violation > worst) {
        worst = violation;
        row = i;
      }
    }
    return team_.argmax(worst, row);
  }

  CL_OPTIM_TEAM void block(int row) {
    if (team_.rank() == 0) blocked_[row] = 1;
    team_.sync();
  }

  // Raises x of the row until its w is 0; the active rows that reach 0 before leave one by one.
  CL_OPTIM_TEAM bool enter(int row) {
    while (true) {
      double least = -r_[row] / entry(row, row);
      int leaving = -1;
      for (int i = team_.rank(); i < size_; i += team_.size()) {
        const double slope = entry(i, row);
        if (!active_[i] || !(slope > 0.0)) continue;
        if (-r_[i] < least * slope) {
          least = -r_[i] / slope;
          leaving = i;
        }
      }
      leaving = team_.argmax(-least, leaving);
      if (leaving < 0) return sweep(row) && repair();
      if (!sweep(leaving)) return false;
    }
  }

  // Solves on the active rows without the tableau's drift, and checks every row. False where the
  // active set had to change for that.
  CL_OPTIM_TEAM bool finish() {
    const int count = list_active();
    for (int i = team_.rank(); i < size_; i += team_.size()) x_[i] = 0.0;
    team_.sync();
    const int failed = factor(count, 0.0);
    if (failed >= 0) {  // the row depends on those before it, as far as Cholesky can tell
      const int row = order_[failed];
      if (sweep(row)) block(row);
      return false;
    }
    for (int round = 0; round < 3; ++round) {
      multiply();
      for (int k = team_.rank(); k < count; k += team_.size()) y_[k] = -w_[order_[k]];
      team_.sync();
      substitute(count);
      for (int k = team_.rank(); k < count; k += team_.size()) x_[order_[k]] += y_[k];
      team_.sync();
    }
    double lowest = 0.0;
    int negative = -1;
    for (int i = team_.rank(); i < size_; i += team_.size()) {
      if (-x_[i] > lowest) {
        lowest = -x_[i];
        negative = i;
      }
    }
    negative = team_.argmax(lowest, negative);
    if (negative >= 0) {  // what the tableau saw in it was rounding
      if (sweep(negative)) block(negative);
      return false;
    }
    multiply();
    margins();
    // A row that is violated now and was not, or was blocked without being dependent, shows that
    // the tableau has drifted.
    dependent_ = false;
    for (int from = 0; from < size_;) {
      const int row = next_violated(from);
      if (row < 0) return true;
      if (!is_blocked_rightly(row, count)) {
        --pivots_left_;
        activate_ordered();
        return false;
      }
      dependent_ = true;
      from = row + 1;
    }
    return true;
  }

  CL_OPTIM_TEAM int next_violated(int from) {
    int row = -1;
    for (int i = team_.rank(); i < size_ && row < 0; i += team_.size()) {
      if (i >= from && !active_[i] && w_[i] < -margin_[i]) row = i;
    }
    return team_.argmax(-row, row);
  }

  // `is_dependent` and `is_rounding` by the Cholesky factor of the active rows, in order_.
  CL_OPTIM_TEAM bool is_blocked_rightly(int row, int count) {
    for (int k = team_.rank(); k < count; k += team_.size()) y_[k] = q(order_[k], row);
    team_.sync();
    forward(count);
    double square = 0.0;
    for (int k = team_.rank(); k < count; k += team_.size()) square += y_[k] * y_[k];
    const double pivot = q(row, row) - team_.sum(square);
    if (!(pivot > options_.threshold * q(row, row))) return true;
    backward(count);
    double noise = 0.0;
    for (int k = team_.rank(); k < count; k += team_.size()) {
      noise += std::fabs(y_[k]) * margin_[order_[k]];
    }
    return !(w_[row] < -(margin_[row] + team_.sum(noise)));
  }

  CL_OPTIM_TEAM int list_active() {
    if (team_.rank() == 0) {
      int count = 0;
      for (int i = 0; i < size_; ++i) {
        if (active_[i]) order_[count++] = i;
      }
      for (int k = count; k < size_; ++k) order_[k] = -1;
    }
    team_.sync();
    int count = 0;
    while (count < size_ && order_[count] >= 0) ++count;
    return count;
  }

  // A fresh tableau with the rows of order_ active, as far as they are independent.
  CL_OPTIM_TEAM bool activate_ordered() {
    start();
    for (int k = 0; k < size_ && order_[k] >= 0; ++k) {
      const int row = order_[k];
      if (!is_dependent(row) && !sweep(row)) return false;
    }
    return true;
  }

  // --- Cholesky --------------------------------------------------------------------------------

  CL_OPTIM_TEAM double& lower(int i, int j) const { return tableau_[i * stride_ + j]; }  // j < i

  // Factors Q + rho I on the first `count` rows of order_; the row where that fails, or -1.
  CL_OPTIM_TEAM int factor(int count, double rho) {
    for (int i = team_.row(); i < count; i += team_.rows()) {
      for (int j = team_.lane(); j < i; j += team_.lanes()) lower(i, j) = q(order_[i], order_[j]);
    }
    for (int i = team_.rank(); i < count; i += team_.size()) {
      diagonal_[i] = q(order_[i], order_[i]) + rho;
    }
    team_.sync();
    for (int k = 0; k < count; ++k) {
      const double square = diagonal_[k];
      if (!(square > 0.0)) return k;
      const double root = std::sqrt(square);
      for (int i = k + 1 + team_.rank(); i < count; i += team_.size()) {
        column_[i] = lower(i, k) / root;
        lower(i, k) = column_[i];
        diagonal_[i] -= column_[i] * column_[i];
      }
      team_.sync();
      if (team_.rank() == 0) diagonal_[k] = root;
      for (int i = k + 1 + team_.row(); i < count; i += team_.rows()) {
        const double factor = column_[i];
        for (int j = k + 1 + team_.lane(); j < i; j += team_.lanes()) {
          lower(i, j) -= factor * column_[j];
        }
      }
      team_.sync();
    }
    return -1;
  }

  // y <- (LL')^-1 y.
  CL_OPTIM_TEAM void substitute(int count) {
    forward(count);
    backward(count);
  }

  // y <- L^-1 y.
  CL_OPTIM_TEAM void forward(int count) {
    for (int k = 0; k < count; ++k) {
      const double value = y_[k] / diagonal_[k];
      team_.sync();
      if (team_.rank() == 0) y_[k] = value;
      for (int i = k + 1 + team_.rank(); i < count; i += team_.size()) y_[i] -= lower(i, k) * value;
      team_.sync();
    }
  }

  // y <- L'^-1 y.
  CL_OPTIM_TEAM void backward(int count) {
    for (int k = count - 1; k >= 0; --k) {
      const double value = y_[k] / diagonal_[k];
      team_.sync();
      if (team_.rank() == 0) y_[k] = value;
      for (int i = team_.rank(); i < k; i += team_.size()) y_[i] -= lower(k, i) * value;
      team_.sync();
    }
  }

  // --- the fallback ----------------------------------------------------------------------------

  // Over-relaxed ADMM (Boyd et al. 2011, section 5.2): its system is always positive definite. Its
  // support, in order_, is where the active-set method begins again.
  CL_OPTIM_TEAM void guess() {
    constexpr double rho = 1.0, relaxation = 1.6;
    for (int i = team_.rank(); i < size_; i += team_.size()) {
      order_[i] = i;
      x_[i] = w_[i] = 0.0;
    }
    team_.sync();
    factor(size_, rho);
    for (int n = 0; n < kIterations; ++n) {
      for (int i = team_.rank(); i < size_; i += team_.size()) {
        y_[i] = rho * (x_[i] - w_[i]) - c_[i];
      }
      team_.sync();
      substitute(size_);
      for (int i = team_.rank(); i < size_; i += team_.size()) {
        const double relaxed = relaxation * y_[i] + (1.0 - relaxation) * x_[i] + w_[i];
        x_[i] = relaxed > 0.0 ? relaxed : 0.0;
        w_[i] = relaxed - x_[i];
      }
      team_.sync();
    }
    for (int i = team_.rank(); i < size_; i += team_.size()) active_[i] = x_[i] > 0.0;
    team_.sync();
    list_active();
  }

  const Team team_;
  const double* gram_;
  const double* linear_;
  const int size_;
  const NNQPOptions options_;
  double* tableau_;
  const int stride_;
  double *scale_, *c_, *base_, *r_, *column_, *margin_, *x_, *w_, *diagonal_, *y_;
  int* order_;
  int8_t *active_, *blocked_;
  int pivots_left_ = 0;
  bool dependent_ = false;
};

}  // namespace cl_optim
