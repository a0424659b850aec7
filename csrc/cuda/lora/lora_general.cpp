// Adapters on fp32 activations: torch's matmuls on blocks of rows.
#include <ATen/ATen.h>

#include "lora_adapters.h"

namespace peft_kernels::cuda {
namespace {

// Deltas and masked activations are computed for a block of rows at a time.
constexpr int64_t kBlockBytes = 16 << 20;

// Calls body(begin, end) for blocks of rows of `features` values; once if there are no rows.
template <class Body>
void by_rows(int64_t rows, int64_t features, const Body& body) {
  const int64_t block = std::max<int64_t>(kBlockBytes / (4 * std::max<int64_t>(features, 1)), 1);
  int64_t begin = 0;
  do {
    const int64_t end = std::min(begin + block, rows);
    body(begin, end);
    begin = end;
  } while (begin < rows);
}

// sum += a b; sum may be undefined at first.
void add_matmul(const Tensor& a, const Tensor& b, Tensor& sum) {
  sum = sum.defined() ? sum.addmm_(a, b) : at::mm(a, b);
}

// Applies dropout to `rows`; `first` is the index of their first element in the activations. Contiguous.
Tensor dropped(const Tensor& rows, const DropoutMask& mask, int64_t first) {
  Tensor out = at::empty_like(rows);
  dropout(rows.const_data_ptr(), DType::kF32, rows.numel(), first, mask, out.mutable_data_ptr(),
          current_stream());
  return out;
}

class GeneralAdapters : public Adapters {
 public:
  GeneralAdapters(std::vector<AdapterArgs> args, const OptionalTensor& seed, const OptionalTensor& groups)
      : Adapters(std::move(args), seed, groups) {
    for (const Adapter& adapter : list()) {
      others_.push_back(row_group() ? row_group()->ne(adapter.group).unsqueeze(1) : Tensor());
    }
  }

  Tensor h(const Tensor& x) const override {
    Tensor h = at::empty({x.size(0), ranks()}, x.options());
    for (size_t i = 0; i < list().size(); ++i) {
      by_rows(x.size(0), x.size(1), [&](int64_t begin, int64_t end) {
        Tensor out = columns(h, i, begin, end);
        at::mm_out(out, seen_rows(x, i, begin, end), list()[i].a.t());
        // Masking x does not suffice: 0 * Inf is not 0.
        clear_others(out, i, begin, end);
      });
    }
    return h;
  }

  Tensor dh(const std::vector<Tensor>& dy) const override {
    const int64_t rows = dy.empty() ? 0 : dy[0].size(0);
    Tensor dh;
    for (size_t i = 0; i < list().size(); ++i) {
      const Tensor& d = dy[list()[i].layer];
      if (!dh.defined()) dh = at::empty({rows, ranks()}, d.options());
      Tensor out = columns(dh, i, 0, rows);
      at::mm_out(out, d, list()[i].b.mul(list()[i].scaling));
      clear_others(out, i, 0, rows);
    }
    return dh;
  }

  SlabTensor slab(const BaseWeight&, size_t, bool, const Tensor&) const override { return {}; }

  void add_deltas(const Tensor& y, size_t layer, const Tensor& h) const override {
    for (size_t i = 0; i < list().size(); ++i) {
      if (list()[i].layer != layer) continue;
      const Tensor b = list()[i].b.mul(list()[i].scaling).t();
      by_rows(y.size(0), y.size(1), [&](int64_t begin, int64_t end) {
        add_delta(at::mm(columns(h, i, begin, end), b), i, begin, end, y);
      });
    }
  }

  Tensor dx(const std::vector<Tensor>& terms, const Tensor& x, const Tensor& dh) const override {
    Tensor out = terms.empty() ? at::zeros(x.sizes(), x.options()) : terms[0];
    for (size_t j = 1; j < terms.size(); ++j) out.add_(terms[j]);
    for (size_t i = 0; i < list().size(); ++i) {
      by_rows(x.size(0), x.size(1), [&](int64_t begin, int64_t end) {
        Tensor delta = at::mm(columns(dh, i, begin, end), list()[i].a);
        if (list()[i].drops()) delta = dropped(delta, list()[i].mask, begin * x.size(1));
        add_delta(delta, i, begin, end, out);
      });
    }
    return out;
  }

  std::vector<Tensor> da(const Tensor& dh, const Tensor& x, const std::vector<bool>& need) const override {
    return gradients(&Adapter::a, need, [&](size_t i) {
      Tensor da;
      by_rows(x.size(0), x.size(1), [&](int64_t begin, int64_t end) {
        add_matmul(columns(dh, i, begin, end).t(), seen_rows(x, i, begin, end), da);
      });
      return da;
    });
  }

  std::vector<Tensor> db(const std::vector<Tensor>& dy, const Tensor& h,
                         const std::vector<bool>& need) const override {
    return gradients(&Adapter::b, need, [&](size_t i) {
      const Tensor& d = dy[list()[i].layer];
      Tensor db;
      by_rows(d.size(0), d.size(1), [&](int64_t begin, int64_t end) {
        Tensor rows = d.slice(0, begin, end);
        if (row_group()) rows = rows.masked_fill(others_[i].slice(0, begin, end), 0);
        add_matmul(rows.t(), columns(h, i, begin, end), db);
      });
      return db.mul_(list()[i].scaling);
    });
  }

 private:
  // The gradients of the needed parameters; the others are empty.
  template <class Compute>
  std::vector<Tensor> gradients(Tensor AdapterArgs::* parameter, const std::vector<bool>& need,
                                const Compute& compute) const {
    std::vector<Tensor> found;
    for (size_t i = 0; i < list().size(); ++i) {
      found.push_back(need[i] ? compute(i) : at::empty({0}, (list()[i].*parameter).options()));
    }
    return found;
  }

  // Rows [begin, end) of x as an adapter sees them: with dropout, and 0 where it does not serve. May share
  // memory with x.
  Tensor seen_rows(const Tensor& x, size_t i, int64_t begin, int64_t end) const {
    Tensor rows = x.slice(0, begin, end);
    if (list()[i].drops()) rows = dropped(rows, list()[i].mask, begin * x.size(1));
    return row_group() ? rows.masked_fill(others_[i].slice(0, begin, end), 0) : rows;
  }

  // The adapter's columns of h or dh, rows [begin, end).
  Tensor columns(const Tensor& h, size_t i, int64_t begin, int64_t end) const {
    return h.slice(0, begin, end).slice(1, list()[i].h_begin, list()[i].h_end());
  }

  void clear_others(Tensor& rows, size_t i, int64_t begin, int64_t end) const {
    if (row_group()) rows.masked_fill_(others_[i].slice(0, begin, end), 0);
  }

  void add_delta(Tensor delta, size_t i, int64_t begin, int64_t end, const Tensor& out) const {
    clear_others(delta, i, begin, end);
    out.slice(0, begin, end).add_(delta);
  }

  std::vector<Tensor> others_;  // per adapter, bool [m, 1]: the rows it does not serve
};

}  // namespace

std::unique_ptr<Adapters> general_adapters(std::vector<AdapterArgs> args, const OptionalTensor& seed,
                                           const OptionalTensor& row_group) {
  return std::make_unique<GeneralAdapters>(std::move(args), seed, row_group);
}

}  // namespace peft_kernels::cuda
