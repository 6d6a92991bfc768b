// The exact GELU and its derivative, of the pre-activation as stored.
//
//   gelu(z) = z Phi(z) = max(z, 0) - |z| Q(|z|),  Q(a) = erfc(a / sqrt(2)) / 2 = exp(-a^2 / 2) R(1 / (1 + c a))
//   gelu'(z) = Phi(z) + z exp(-z^2 / 2) / sqrt(2 pi)
//
// R is a polynomial fitted for the least relative error (1e-8 for float32; 2e-6 for 16 bit, six terms instead of nine):
// the negative tail keeps its digits, which z (1 + erf) / 2 loses.
namespace internvit::INTERNVIT_ISA {

struct GeluParts {
  Vec tail;      // Q(|z|)
  Vec gaussian;  // exp(-z^2 / 2)
};

template <class T>
INTERNVIT_INLINE GeluParts gelu_parts(Vec magnitude) {
  const Vec t = reciprocal(fma(magnitude, broadcast(sizeof(T) == 4 ? 0.33f : 0.30f), broadcast(1.0f)));
  Vec r;
  if constexpr (sizeof(T) == 4) {
    r = fma(broadcast(-0.0261072877f), t, broadcast(0.149803736f));
    r = fma(r, t, broadcast(-0.325071533f));
    r = fma(r, t, broadcast(0.295118414f));
    r = fma(r, t, broadcast(-0.109551128f));
    r = fma(r, t, broadcast(0.147302035f));
    r = fma(r, t, broadcast(0.103260786f));
    r = fma(r, t, broadcast(0.133769263f));
    r = fma(r, t, broadcast(0.131468936f));
    r = fma(r, t, broadcast(6.78320019e-06f));
  } else {
    r = fma(broadcast(-0.0845930932f), t, broadcast(0.240572196f));
    r = fma(r, t, broadcast(-0.0486433852f));
    r = fma(r, t, broadcast(0.164763555f));
    r = fma(r, t, broadcast(0.10670497f));
    r = fma(r, t, broadcast(0.121274595f));
    r = fma(r, t, broadcast(-7.97792693e-05f));
  }
  const Vec gaussian = exp2_float32(magnitude * magnitude * broadcast(-0.72134752f));
  return {gaussian * r, gaussian};
}

// Q is 0 in float32 beyond this, and z^2 stays finite. min and max return their second operand for NaN: z comes second.
constexpr float kGeluEnd = 14.5f;

template <class T>
INTERNVIT_INLINE Vec gelu_of(Vec z) {
  const Vec a = min(broadcast(kGeluEnd), abs(z));
  return max(broadcast(0.0f), z) - a * gelu_parts<T>(a).tail;
}

template <class T>
INTERNVIT_INLINE Vec gelu_slope(Vec z) {
  const Vec a = min(broadcast(kGeluEnd), abs(z)), half = broadcast(0.5f);
  const GeluParts parts = gelu_parts<T>(a);
  const Vec odd = fma(a * parts.gaussian, broadcast(0.3989422804f), half - parts.tail);  // of gelu' - 1/2
  return half + copy_sign(odd, z);
}

template <class T>
void gelu_elements(const GeluParams& p, const Executor& executor) {
  const T* z = static_cast<const T*>(p.pre_activation);
  T* y = static_cast<T*>(p.y);
  const int64_t blocks = (p.size + 1023) / 1024;
  parallel(executor, blocks, 8, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * 1024, n = min_of(end * 1024, p.size) - first;
    if (p.grad_y) {
      const T* grad = static_cast<const T*>(p.grad_y) + first;
      for_lanes(n, INTERNVIT_BODY(c, lanes, u) {
        store(y + first + c, load(grad + c, lanes) * gelu_slope<T>(load(z + first + c, lanes)), lanes);
      });
    } else {
      for_lanes(n, INTERNVIT_BODY(c, lanes, u) {
        store(y + first + c, gelu_of<T>(load(z + first + c, lanes)), lanes);
      });
    }
  });
}

void gelu(const GeluParams& p, const Executor& executor) {
  INTERNVIT_DISPATCH(p.dtype, T, gelu_elements<T>(p, executor));
}

}  // namespace internvit::INTERNVIT_ISA
