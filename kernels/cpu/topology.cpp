// Where the nonzeros are: the index of a CSR weight after a move, and the difference of two sets of positions.
//
// Everything is linear in entries, rows and columns, and the same for any number of threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <tuple>
#include <vector>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kEntriesPerThread = 1 << 16;  // below it, waking a thread costs more than it saves

int64_t parts_for(int64_t entries) {
  return std::min<int64_t>(torch::stable::get_num_threads(), 1 + entries / kEntriesPerThread);
}

// f(part) for every part, a thread each.
template <class F>
void share(int64_t parts, const F& f) {
  if (parts <= 1) return f(int64_t(0));
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; part++) f(part);
  });
}

const int64_t* positions(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Long && t.dim() == 1 && t.is_contiguous(), "fxsparse: expected ", name,
                  " as contiguous int64 [n]");
  return static_cast<const int64_t*>(t.const_data_ptr());
}

int32_t* index32(const Tensor& t, int64_t count, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Int && t.is_contiguous() && t.numel() == count, "fxsparse: expected ",
                  name, " int32, contiguous, with ", count, " elements, got ", t.numel());
  return static_cast<int32_t*>(t.mutable_data_ptr());
}

bool ascending(const int64_t* flat, int64_t nnz, int64_t numel, int64_t parts) {
  if (nnz && (flat[0] < 0 || flat[nnz - 1] >= numel)) return false;
  std::atomic<bool> sorted{true};
  share(parts, [&](int64_t part) {
    int64_t repeats = 0;
    for (int64_t e = std::max<int64_t>(1, nnz * part / parts); e < nnz * (part + 1) / parts; e++)
      repeats += flat[e] <= flat[e - 1];
    if (repeats) sorted = false;
  });
  return sorted;
}

struct Index {
  int64_t rows, columns, capacity;
  int32_t *row, *column, *crow, *ccol, *rows_t, *perm;  // the last two null where they are not kept
};

// Rows, columns and crow of the entries [begin, end), and how many of them each column has.
void split(const int64_t* flat, int64_t begin, int64_t end, const Index& index, int32_t* counts) {
  int64_t row = begin ? flat[begin - 1] / index.columns : -1, row_end = (row + 1) * index.columns;
  for (int64_t e = begin; e < end; e++) {
    while (flat[e] >= row_end) {
      index.crow[++row] = int32_t(e);
      row_end += index.columns;
    }
    const int64_t column = flat[e] - (row_end - index.columns);
    index.row[e] = int32_t(row);
    index.column[e] = int32_t(column);
    counts[column]++;
  }
}

// From counts [parts, columns] to ccol, and in their place to where each part's entries of a column begin.
void accumulate(std::vector<int32_t>& counts, int64_t parts, const Index& index) {
  int32_t sum = 0;
  for (int64_t c = 0; c < index.columns; c++) {
    index.ccol[c] = sum;
    for (int64_t part = 0; part < parts; part++) {
      const int32_t count = counts[part * index.columns + c];
      counts[part * index.columns + c] = sum;
      sum += count;
    }
  }
  index.ccol[index.columns] = sum;
}

// A bool scalar, as ops that write to their arguments may return nothing but tensors.
Tensor csr_move_(const Tensor& flat_positions, const Tensor& indices, const Tensor& crow, const Tensor& ccol,
               const Tensor& rows_t, const Tensor& perm) {
  const int64_t* flat = positions(flat_positions, "positions");
  const int64_t nnz = flat_positions.numel(), capacity = indices.numel() / 2;
  const bool transposed = perm.numel() > 0;
  STD_TORCH_CHECK(nnz <= capacity && crow.numel() > 0 && ccol.numel() > 0, "fxsparse: expected at most ", capacity,
                  " positions, and row and column pointers");
  int32_t* row = index32(indices, 2 * capacity, "indices");
  const Index index{crow.numel() - 1,
                    ccol.numel() - 1,
                    capacity,
                    row,
                    row + capacity,
                    index32(crow, crow.numel(), "crow"),
                    index32(ccol, ccol.numel(), "ccol"),
                    transposed ? index32(rows_t, capacity, "rows_t") : nullptr,
                    transposed ? index32(perm, capacity, "perm") : nullptr};
  const int64_t threads = parts_for(nnz);
  Tensor moved = torch::stable::new_empty(flat_positions, {}, ScalarType::Bool);
  bool& is_moved = *static_cast<bool*>(moved.mutable_data_ptr());
  is_moved = ascending(flat, nnz, index.rows * index.columns, threads);
  if (!is_moved) return moved;

  // Each part counts all columns: no more parts than leave that below the entries.
  const int64_t parts = std::min(threads, 1 + nnz / std::max<int64_t>(1, index.columns));
  std::vector<int32_t> counts(parts * index.columns);
  share(parts, [&](int64_t part) {
    split(flat, nnz * part / parts, nnz * (part + 1) / parts, index, counts.data() + part * index.columns);
  });
  const int64_t last = nnz ? flat[nnz - 1] / index.columns : -1;
  std::fill(index.crow + last + 1, index.crow + index.rows + 1, int32_t(nnz));
  accumulate(counts, parts, index);
  for (int32_t* entries : {index.row, index.column}) std::fill(entries + nnz, entries + capacity, -1);
  if (!transposed) return moved;
  share(parts, [&](int64_t part) {
    int32_t* next = counts.data() + part * index.columns;
    for (int64_t e = nnz * part / parts; e < nnz * (part + 1) / parts; e++) {
      const int32_t slot = next[index.column[e]]++;
      index.rows_t[slot] = index.row[e];
      index.perm[slot] = int32_t(e);
    }
  });
  for (int32_t* entries : {index.rows_t, index.perm}) std::fill(entries + nnz, entries + capacity, -1);
  return moved;
}

struct Counts {
  int64_t pruned, grown, kept;
};

// One step for each distinct position in old [i, i_end) and new [j, j_end): f(in old, in new, i, j).  It advances without
// a branch, as nothing predicts which of the two comes next.
template <class F>
void merge(const int64_t* old, int64_t i, int64_t i_end, const int64_t* fresh, int64_t j, int64_t j_end, const F& f) {
  while (i < i_end && j < j_end) {
    const int64_t a = old[i], b = fresh[j];
    f(a <= b, b <= a, i, j);
    i += a <= b;
    j += b <= a;
  }
  for (; i < i_end; i++) f(true, false, i, j);
  for (; j < j_end; j++) f(false, true, i, j);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> position_change(const Tensor& old_positions, const Tensor& new_positions) {
  const int64_t *old = positions(old_positions, "old positions"), *fresh = positions(new_positions, "new positions");
  const int64_t old_count = old_positions.numel(), new_count = new_positions.numel();
  const int64_t parts = std::max<int64_t>(1, std::min(parts_for(old_count + new_count), old_count));
  std::vector<int64_t> i_of(parts + 1, old_count), j_of(parts + 1, new_count);
  i_of[0] = j_of[0] = 0;
  for (int64_t part = 1; part < parts; part++) {
    i_of[part] = old_count * part / parts;
    j_of[part] = std::lower_bound(fresh, fresh + new_count, old[i_of[part]]) - fresh;
  }
  std::vector<Counts> starts(parts + 1, Counts{0, 0, 0});
  share(parts, [&](int64_t part) {
    int64_t kept = 0;
    merge(old, i_of[part], i_of[part + 1], fresh, j_of[part], j_of[part + 1],
          [&](bool in_old, bool in_new, int64_t, int64_t) { kept += in_old & in_new; });
    starts[part + 1] = {i_of[part + 1] - i_of[part] - kept, j_of[part + 1] - j_of[part] - kept, kept};
  });
  for (int64_t part = 0; part < parts; part++) {
    starts[part + 1].pruned += starts[part].pruned;
    starts[part + 1].grown += starts[part].grown;
    starts[part + 1].kept += starts[part].kept;
  }

  const Counts total = starts[parts];
  Tensor pruned = torch::stable::new_empty(old_positions, {total.pruned});
  Tensor grown = torch::stable::new_empty(old_positions, {total.grown});
  Tensor kept_from = torch::stable::new_empty(old_positions, {total.kept});
  Tensor kept_to = torch::stable::new_empty(old_positions, {total.kept});
  auto* to_pruned = static_cast<int64_t*>(pruned.mutable_data_ptr());
  auto* to_grown = static_cast<int64_t*>(grown.mutable_data_ptr());
  auto* to_kept_from = static_cast<int64_t*>(kept_from.mutable_data_ptr());
  auto* to_kept_to = static_cast<int64_t*>(kept_to.mutable_data_ptr());
  share(parts, [&](int64_t part) {
    Counts at = starts[part];
    merge(old, i_of[part], i_of[part + 1], fresh, j_of[part], j_of[part + 1],
          [&](bool in_old, bool in_new, int64_t i, int64_t j) {
            if (in_old & in_new) {
              to_kept_from[at.kept] = i;
              to_kept_to[at.kept++] = j;
            } else if (in_old) {
              to_pruned[at.pruned++] = old[i];
            } else {
              to_grown[at.grown++] = fresh[j];
            }
          });
  });
  return {pruned, grown, kept_from, kept_to};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fxsparse, CPU, m) {
  m.impl("csr_move_", TORCH_BOX(&csr_move_));
  m.impl("position_change", TORCH_BOX(&position_change));
}
