// The losses of adversarial training, their mean over the logits and its gradient.
//
// Every one of them is a mean of phi(offset + sign * x) over real logits, the same over generated
// ones, or both; the relativistic one has for x the difference of a pair.
#include "enum_dispatch.h"
#include "per_sample.h"
#include "sums.h"

namespace aigc_fast {
namespace {

// The numbers are part of the operator's schema: aigc_fast/ops/gan_loss.py holds the same list.
enum class Loss : int64_t { non_saturating, least_squares, hinge, wasserstein, relativistic };
constexpr int64_t kNumLosses = 5;

enum class Phi { softplus, half_square, relu, identity };
constexpr int64_t kNumPhis = 4;

template <Phi phi, class A>
AIGC_INLINE Vec<A> value(Vec<A> u) {
  if constexpr (phi == Phi::softplus)
    return max<A>(u, Vec<A>{}) + log1p_unit<A>(exp<A>(-abs<A>(u)));
  if constexpr (phi == Phi::half_square) return u * u * A(0.5);
  if constexpr (phi == Phi::relu) return max<A>(u, Vec<A>{});
  if constexpr (phi == Phi::identity) return u;
}
template <Phi phi, class A>
AIGC_INLINE Vec<A> slope(Vec<A> u) {
  if constexpr (phi == Phi::softplus) return sigmoid<A>(u);
  if constexpr (phi == Phi::half_square) return u;
  if constexpr (phi == Phi::relu) return u > 0 ? broadcast(A(1)) : Vec<A>{};
  if constexpr (phi == Phi::identity) return broadcast(A(1));
}

struct Terms {
  Phi phi;
  double real_offset, fake_offset, fake_sign;  // the sign of real is -1
};

Terms terms_of(Loss loss, bool generator) {
  if (generator) {
    const bool plain = loss == Loss::hinge || loss == Loss::wasserstein;
    const bool square = loss == Loss::least_squares;
    return {plain    ? Phi::identity
            : square ? Phi::half_square
                     : Phi::softplus,
            0, square ? 1.0 : 0.0, -1};
  }
  switch (loss) {
    case Loss::least_squares:
      return {Phi::half_square, 1, 0, 1};
    case Loss::hinge:
      return {Phi::relu, 1, 1, 1};
    case Loss::wasserstein:
      return {Phi::identity, 0, 0, 1};
    default:
      return {Phi::softplus, 0, 0, 1};
  }
}

template <class F>
void with_phi(Phi phi, F&& f) {
  with_enum<Phi, kNumPhis>(static_cast<int64_t>(phi), "phi", f);
}

// The logits of a call, dense; those of a pair in one memory order.
struct Logits {
  Tensor fake;
  MaybeTensor real;
  bool paired;
  Terms terms;

  Logits(const MaybeTensor& real_in, const Tensor& fake_in, int64_t loss, bool generator)
      : fake(as_dense(fake_in)), paired(loss == static_cast<int64_t>(Loss::relativistic)) {
    require(loss >= 0 && loss < kNumLosses, "loss must be in [0, ", kNumLosses, ")");
    require(real_in || !paired, "real must be given");
    require(fake.numel() > 0 && (!real_in || real_in->numel() > 0), "logits must not be empty");
    require(!real_in || real_in->scalar_type() == fake.scalar_type(),
            "real must have the dtype of fake");
    require(!paired || same_shape(*real_in, fake), "real must have the shape of fake");
    if (real_in) real = paired ? in_order_of(*real_in, fake) : as_dense(*real_in);
    terms = terms_of(static_cast<Loss>(loss), generator);
  }
};

// Elements whose sums meet before they join the others.
constexpr int64_t kPart = 4096;

// The mean of f(i, lanes) over [0, size).
template <class A, class F>
double mean_of(int64_t size, F f) {
  std::vector<double> parts((size + kPart - 1) / kPart);
  in_parallel(parts.size(), kPart, [&](int64_t p) {
    const int64_t start = p * kPart;
    const auto [sum] =
        sums_over<A, 1>(std::min(kPart, size - start), [&](int64_t i, auto lanes, Vec<A>* sums) {
          sums[0] += only<A>(f(start + i, lanes), lanes);
        });
    parts[p] = sum;
  });
  double total = 0;
  for (double part : parts) total += part;
  return total / static_cast<double>(size);
}

Tensor gan_loss(const MaybeTensor& real_in, const Tensor& fake_in, int64_t loss, bool generator) {
  const Logits logits(real_in, fake_in, loss, generator);
  Tensor out = empty({}, acc_dtype(fake_in));
  dispatch(fake_in, "fake", [&]<class T>(T) {
    using A = Acc<T>;
    const T *fake = data<T>(logits.fake), *real = logits.real ? data<T>(*logits.real) : nullptr;
    const A sign = A(logits.terms.fake_sign);
    const A of_real = A(logits.terms.real_offset), of_fake = A(logits.terms.fake_offset);
    double result = 0;
    with_phi(logits.terms.phi, [&]<Phi phi>(std::integral_constant<Phi, phi>) {
      if (logits.paired) {
        result = mean_of<A>(logits.fake.numel(), [=](int64_t i, auto lanes) {
          return value<phi, A>((load(fake + i, lanes) - load(real + i, lanes)) * sign);
        });
        return;
      }
      result = mean_of<A>(logits.fake.numel(), [=](int64_t i, auto lanes) {
        return value<phi, A>(of_fake + load(fake + i, lanes) * sign);
      });
      if (real)
        result += mean_of<A>(logits.real->numel(), [=](int64_t i, auto lanes) {
          return value<phi, A>(of_real - load(real + i, lanes));
        });
    });
    set_number(out, 0, result);
  });
  return out;
}

// (gradient of real or empty, gradient of fake)
std::tuple<Tensor, Tensor> gan_loss_backward(const Tensor& grad_in, const MaybeTensor& real_in,
                                             const Tensor& fake_in, int64_t loss, bool generator) {
  const Logits logits(real_in, fake_in, loss, generator);
  require(grad_in.numel() == 1, "grad_output must be a scalar");
  const double grad = Scalars(grad_in, "grad_output")[0];
  Tensor fake_grad = empty_like_dense(logits.fake);
  Tensor real_grad =
      logits.real ? empty_like_dense(*logits.real) : empty({0}, fake_in.scalar_type());
  dispatch(fake_in, "fake", [&]<class T>(T) {
    using A = Acc<T>;
    const T *fake = data<T>(logits.fake), *real = logits.real ? data<T>(*logits.real) : nullptr;
    T *to_fake = mutable_data<T>(fake_grad), *to_real = mutable_data<T>(real_grad);
    const A sign = A(logits.terms.fake_sign), scale = A(grad / logits.fake.numel());
    const A of_real = A(logits.terms.real_offset), of_fake = A(logits.terms.fake_offset);
    const auto for_all = [](int64_t size, auto f) {
      torch::stable::parallel_for(0, (size + kPart - 1) / kPart, grain_of(kPart),
                                  [&](int64_t begin, int64_t end) {
                                    const int64_t start = begin * kPart;
                                    for_vectors<A>(std::min(size, end * kPart) - start,
                                                   [&](int64_t i, auto n) { f(start + i, n); });
                                  });
    };
    with_phi(logits.terms.phi, [&]<Phi phi>(std::integral_constant<Phi, phi>) {
      for_all(logits.fake.numel(), [=, paired = logits.paired](int64_t i, auto lanes) {
        const Vec<A> x = load(fake + i, lanes) - (paired ? load(real + i, lanes) : Vec<A>{});
        const Vec<A> g = slope<phi, A>(of_fake + x * sign) * (scale * sign);
        store(to_fake + i, g, lanes);
        if (paired) store(to_real + i, -g, lanes);
      });
      if (!real || logits.paired) return;
      const A real_scale = A(grad / logits.real->numel());
      for_all(logits.real->numel(), [=](int64_t i, auto lanes) {
        store(to_real + i, slope<phi, A>(of_real - load(real + i, lanes)) * -real_scale, lanes);
      });
    });
  });
  return {real_grad, fake_grad};
}

STABLE_TORCH_LIBRARY_IMPL(aigc_fast, CPU, m) {
  m.impl("gan_loss", TORCH_BOX(&gan_loss));
  m.impl("gan_loss_backward", TORCH_BOX(&gan_loss_backward));
}

}  // namespace
}  // namespace aigc_fast
