// Solves problems by one thread and by teams of threads that share their memory as a warp or a
// block does, and compares: what the GPU's teams do, on a machine without a GPU. Built with
// ThreadSanitizer, it finds a sync() that is missing.
//
// Usage: nnqp_team FILE. The file holds int32 count, then per problem int32 size, float64 lower,
// Q [size, size], c [size].
#include <pthread.h>

#include <cstdio>
#include <cstring>
#include <fstream>
#include <thread>
#include <vector>

#include "nnqp.h"

namespace {

using namespace cl_optim;

struct Shared {
  Shared(int rows, int lanes)
      : rows(rows), lanes(lanes), values(rows * lanes), indices(values.size()) {
    pthread_barrier_init(&barrier, nullptr, rows * lanes);
  }
  ~Shared() { pthread_barrier_destroy(&barrier); }
  const int rows, lanes;
  std::vector<double> values;
  std::vector<int> indices;
  pthread_barrier_t barrier;
};

struct ThreadTeam {
  Shared* shared;
  int thread;

  int rank() const { return thread; }
  int size() const { return shared->rows * shared->lanes; }
  int row() const { return thread / shared->lanes; }
  int rows() const { return shared->rows; }
  int lane() const { return thread % shared->lanes; }
  int lanes() const { return shared->lanes; }
  void sync() const { pthread_barrier_wait(&shared->barrier); }

  int argmax(double value, int index) const {
    shared->values[thread] = value;
    shared->indices[thread] = index;
    sync();
    int best = -1;
    for (int i = 0; i < size(); ++i) {
      const int other = shared->indices[i];
      if (other < 0) continue;
      if (best < 0 || shared->values[i] > value || (shared->values[i] == value && other < best)) {
        value = shared->values[i];
        best = other;
      }
    }
    sync();
    return best;
  }
  bool any(bool value) const { return sum(value ? 1.0 : 0.0) > 0.0; }
  double sum(double value) const {
    shared->values[thread] = value;
    sync();
    double total = 0.0;
    for (double part : shared->values) total += part;
    sync();
    return total;
  }
};

struct Result {
  std::vector<double> v, state;
  double gap = 0.0;
  int8_t status = 0;
};

struct Work {
  std::vector<double> tableau, vectors;
  Work(int size)
      : tableau(size * (size | 1)), vectors(NNQPMemory::vector_bytes(size) / sizeof(double) + 1) {}
  NNQPMemory memory(int size) { return {tableau.data(), size | 1, vectors.data()}; }
};

Result solve(const NNQPProblem& problem, const NNQPOptions& options, Shared* shared, int calls) {
  const int size = problem.size;
  Result result{std::vector<double>(size), std::vector<double>(size * (size + 1)), 0.0, 0};
  Work work(size);
  const auto call = [&](auto team) {
    NNQPSolver<decltype(team)> solver(team, problem, options, work.memory(size));
    for (int n = 0; n < calls; ++n) {
      solver.solve(result.v.data(), &result.status, &result.gap, result.state.data());
      team.sync();
    }
  };
  if (shared == nullptr) {
    call(SingleLane{});
    return result;
  }
  std::vector<std::thread> threads;
  for (int i = 0; i < shared->rows * shared->lanes; ++i) {
    threads.emplace_back([&, i] { call(ThreadTeam{shared, i}); });
  }
  for (std::thread& thread : threads) thread.join();
  return result;
}

template <typename T>
T read(std::ifstream& file) {
  T value;
  file.read(reinterpret_cast<char*>(&value), sizeof(T));
  return value;
}

}  // namespace

int main(int, char** arguments) {
  std::ifstream file(arguments[1], std::ios::binary);
  const int count = read<int>(file);
  for (int n = 0; n < count; ++n) {
    const int size = read<int>(file);
    const double lower = read<double>(file);
    std::vector<double> gram(size * size), linear(size);
    file.read(reinterpret_cast<char*>(gram.data()), gram.size() * sizeof(double));
    file.read(reinterpret_cast<char*>(linear.data()), linear.size() * sizeof(double));
    const NNQPProblem problem{gram.data(), linear.data(), size};
    for (int max_pivots : {0, 1}) {  // with 1, the fallback runs
      const NNQPOptions options{lower, 1e-15, 64 * 1.1e-16 * size, false, max_pivots};
      const Result alone = solve(problem, options, nullptr, 2);
      for (auto [rows, lanes] : {std::pair{1, 4}, std::pair{3, 2}}) {
        Shared shared(rows, lanes);
        const Result together = solve(problem, options, &shared, 2);
        // Nothing but the gap is summed across threads, so v is the same bit for bit.
        if (together.status != alone.status ||
            std::memcmp(together.v.data(), alone.v.data(), size * sizeof(double)) != 0) {
          std::printf("problem %d, %d x %d threads: status %d, not %d\n", n, rows, lanes,
                      together.status, alone.status);
          return 1;
        }
      }
    }
  }
  std::printf("%d problems\n", count);
  return 0;
}
