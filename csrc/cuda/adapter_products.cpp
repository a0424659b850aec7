#include "adapter_products.h"

namespace peft_kernels::cuda {
namespace {

// Activations become fp32, and deltas are kept, for a block of rows at a time.
constexpr int64_t kBlockBytes = 16 << 20;

// Calls body(begin, end) for blocks of rows of `features` values; once where there are none.
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

// Adds a b to `sum`, which is not there at first.
void add_product(const Tensor& a, const Tensor& b, Tensor& sum) {
  sum = sum.defined() ? sum.addmm_(a, b) : at::mm(a, b);
}

// `rows` in fp32 with a mask, of which `first` is the number of their first element. Contiguous.
Tensor dropped(const Tensor& rows, const DropoutMask& mask, int64_t first) {
  Tensor out = at::empty(rows.sizes(), rows.options().dtype(at::kFloat));
  TORCH_CHECK(false, "dropout: no kernel yet");
  return out;
}

// Rows [begin, end) of x in fp32, as an adapter sees them: with its mask, and 0 where it does not serve. May
// share memory with x.
Tensor seen_rows(const Tensor& x, const Adapter& adapter, int64_t begin, int64_t end) {
  Tensor rows = x.slice(0, begin, end);
  if (adapter.drops()) {
    rows = dropped(rows, adapter.mask, begin * x.size(1));
  } else {
    rows = rows.to(at::kFloat);
  }
  return adapter.others.defined() ? rows.masked_fill(adapter.others.slice(0, begin, end), 0) : rows;
}

// dh or h of one adapter, rows [begin, end).
Tensor columns(const Tensor& h, const Adapter& adapter, int64_t begin, int64_t end) {
  return h.slice(0, begin, end).slice(1, adapter.h_begin, adapter.h_end());
}

// Adds a product of an adapter to `sum`, which may not be there yet: 0 in the rows of others, whatever the
// adapter holds.
void add_part(const Adapter& adapter, int64_t begin, int64_t end, Tensor part, Tensor& sum) {
  if (adapter.others.defined()) part.masked_fill_(adapter.others.slice(0, begin, end), 0);
  sum = sum.defined() ? sum.add_(part) : part;
}

}  // namespace

Adapter::Adapter(AdapterArgs args, const OptionalTensor& seed_tensor, const OptionalTensor& row_group)
    : AdapterArgs(std::move(args)), mask{nullptr, dropout.stream, dropout.threshold, dropout.scale} {
  if (drops()) {
    seed = *seed_tensor;
    mask.seed = seed.const_data_ptr<int64_t>();
  }
  if (row_group) others = row_group->ne(group).unsqueeze(1);
}

Adapters with_rows(std::vector<AdapterArgs> args, const OptionalTensor& seed,
                   const OptionalTensor& row_group) {
  Adapters adapters;
  adapters.reserve(args.size());
  for (AdapterArgs& adapter : args) adapters.emplace_back(std::move(adapter), seed, row_group);
  return adapters;
}

Tensor down_products(const Tensor& x, const Adapters& adapters) {
  Tensor h = at::empty({x.size(0), ranks_of(adapters)}, x.options().dtype(at::kFloat));
  for (const Adapter& adapter : adapters) {
    const Tensor a = adapter.a.to(at::kFloat).t();
    by_rows(x.size(0), x.size(1), [&](int64_t begin, int64_t end) {
      Tensor out = columns(h, adapter, begin, end);
      at::mm_out(out, seen_rows(x, adapter, begin, end), a);
      // A row that is all zeros is not 0 yet where the adapter holds Inf.
      if (adapter.others.defined()) out.masked_fill_(adapter.others.slice(0, begin, end), 0);
    });
  }
  return h;
}

void add_deltas(const Tensor& h, const Adapters& adapters, size_t layer, Tensor& y) {
  std::vector<const Adapter*> own;
  std::vector<Tensor> scaled_b;
  for (const Adapter& adapter : adapters) {
    if (adapter.layer != layer) continue;
    own.push_back(&adapter);
    scaled_b.push_back(adapter.b.to(at::kFloat).mul(adapter.scaling).t());
  }
  if (own.empty()) return;
  by_rows(y.size(0), y.size(1), [&](int64_t begin, int64_t end) {
    Tensor delta;
    for (size_t i = 0; i < own.size(); ++i) {
      add_part(*own[i], begin, end, at::mm(columns(h, *own[i], begin, end), scaled_b[i]), delta);
    }
    y.slice(0, begin, end).add_(delta);  // rounds once
  });
}

Tensor up_gradients(const std::vector<Tensor>& dy, const Adapters& adapters, const Tensor& h) {
  Tensor dh = at::empty_like(h);
  for (const Adapter& adapter : adapters) {
    const Tensor& d = dy[adapter.layer];
    const Tensor scaled_b = adapter.b.to(at::kFloat).mul(adapter.scaling);
    by_rows(d.size(0), d.size(1), [&](int64_t begin, int64_t end) {
      Tensor out = columns(dh, adapter, begin, end);
      at::mm_out(out, d.slice(0, begin, end).to(at::kFloat), scaled_b);
      if (adapter.others.defined()) out.masked_fill_(adapter.others.slice(0, begin, end), 0);
    });
  }
  return dh;
}

void add_input_gradients(const Tensor& dh, const Adapters& adapters, Tensor& dx) {
  if (adapters.empty()) return;
  std::vector<Tensor> a;
  for (const Adapter& adapter : adapters) a.push_back(adapter.a.to(at::kFloat));
  by_rows(dx.size(0), dx.size(1), [&](int64_t begin, int64_t end) {
    Tensor delta;
    for (size_t i = 0; i < adapters.size(); ++i) {
      const Adapter& adapter = adapters[i];
      Tensor part = at::mm(columns(dh, adapter, begin, end), a[i]);
      if (adapter.drops()) part = dropped(part, adapter.mask, begin * dx.size(1));
      add_part(adapter, begin, end, part, delta);
    }
    dx.slice(0, begin, end).add_(delta);
  });
}

Tensor gradient_of_a(const Tensor& dh, const Tensor& x, const Adapter& adapter) {
  Tensor da;
  by_rows(x.size(0), x.size(1), [&](int64_t begin, int64_t end) {
    add_product(columns(dh, adapter, begin, end).t(), seen_rows(x, adapter, begin, end), da);
  });
  return da.to(adapter.a.scalar_type());
}

Tensor gradient_of_b(const Tensor& dy, const Tensor& h, const Adapter& adapter) {
  Tensor db;
  by_rows(dy.size(0), dy.size(1), [&](int64_t begin, int64_t end) {
    Tensor rows = dy.slice(0, begin, end).to(at::kFloat);
    if (adapter.others.defined()) rows = rows.masked_fill(adapter.others.slice(0, begin, end), 0);
    add_product(rows.t(), columns(h, adapter, begin, end), db);
  });
  return db.mul_(adapter.scaling).to(adapter.b.scalar_type());
}

}  // namespace peft_kernels::cuda
