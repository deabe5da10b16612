// Floating-point formats in exact arithmetic (BigInt): what number_formats.py is in Python, so that a bit toggles at once.
// A pattern is a Number; a real is {kind: "finite" | "infinity" | "nan", negative, num, den, payload}, with num / den the
// magnitude and payload = [p, q] a NaN's mantissa field as a fraction of 1. A test compares every function with Python's.

class NumberFormat {
  constructor(name, title, exponentBits, mantissaBits, hasInfinity = true) {
    Object.assign(this, { name, title, exponentBits, mantissaBits, hasInfinity });
    this.numBits = 1 + exponentBits + mantissaBits;
    this.bias = 2 ** (exponentBits - 1) - 1;
    this.minExponent = 1 - this.bias;
    this.hidden = 2 ** mantissaBits;
    this.signBit = 2 ** (this.numBits - 1);
    this.infinity = hasInfinity ? (2 ** exponentBits - 1) * this.hidden : null;
    this.nan = hasInfinity ? this.infinity + this.hidden / 2 : this.signBit - 1;
    this.largest = hasInfinity ? this.infinity - 1 : this.signBit - 2;
  }

  parts(bits) {
    const magnitude = bits % this.signBit;
    return [bits >= this.signBit ? 1 : 0, Math.floor(magnitude / this.hidden), magnitude % this.hidden];
  }

  kind(bits) {
    const [, exponent, mantissa] = this.parts(bits), magnitude = bits % this.signBit;
    if (magnitude > this.largest) return magnitude === this.infinity ? "infinity" : "nan";
    return exponent ? "normal" : mantissa ? "subnormal" : "zero";
  }

  // [n, p] with magnitude = n * 2^p: n has the hidden bit, p counts the ulp.
  integerAndPower(bits) {
    const [, exponent, mantissa] = this.parts(bits);
    return [(exponent ? this.hidden : 0) + mantissa, Math.max(exponent, 1) - this.bias - this.mantissaBits];
  }

  decode(bits) {
    const kind = this.kind(bits), negative = bits >= this.signBit;
    if (kind === "nan") return { kind, negative, payload: this.hasInfinity ? [this.parts(bits)[2], this.hidden] : [1, 2] };
    if (kind === "infinity") return { kind, negative };
    const [n, p] = this.integerAndPower(bits);
    return finite(negative, BigInt(n), 1n, p);
  }

  // The nearest pattern, ties to even; with truncate, the next one toward zero. See Format.encode in number_formats.py.
  encode(real, truncate = false) {
    const sign = real.negative ? this.signBit : 0;
    if (real.kind === "nan") {
      if (!this.hasInfinity) return sign + this.nan;
      const [p, q] = real.payload, half = this.hidden / 2, kept = Math.floor((p / q) * this.hidden);
      return sign + this.infinity + (kept >= half ? kept : kept + half);  // the quiet bit is set
    }
    if (real.kind === "infinity") return sign + (this.hasInfinity ? this.infinity : this.nan);
    if (real.num === 0n) return sign;
    const exponent = Math.max(floorLog2(real.num, real.den), this.minExponent);
    const power = exponent - this.mantissaBits;
    const over = power < 0 ? real.num << BigInt(-power) : real.num, under = power > 0 ? real.den << BigInt(power) : real.den;
    let whole = over / under;
    const rest = 2n * (over % under);
    if (!truncate && (rest > under || (rest === under && whole & 1n))) whole += 1n;
    let pattern = (exponent - this.minExponent) * this.hidden + Number(whole);
    if (pattern > this.largest) pattern = truncate ? this.largest : this.hasInfinity ? this.infinity : this.nan;
    return sign + pattern;
  }

  // Along the number line, as an integer: both zeros are 0, each neighbour is 1 away; null for NaN.
  order(bits) {
    if (this.kind(bits) === "nan") return null;
    return bits >= this.signBit ? -(bits - this.signBit) : bits;
  }
  fromOrder(order) {
    const last = this.largest + (this.hasInfinity ? 1 : 0);
    return Math.abs(order) > last ? null : order < 0 ? this.signBit - order : order;
  }
  neighbours(bits) {
    const order = this.order(bits);
    return order === null ? [null, null] : [this.fromOrder(order - 1), this.fromOrder(order + 1)];
  }
  // The power of two that the last mantissa bit is worth; null for infinity and NaN.
  ulpPower(bits) {
    return ["infinity", "nan"].includes(this.kind(bits)) ? null : this.integerAndPower(bits)[1];
  }
  hex(bits) { return `0x${bits.toString(16).toUpperCase().padStart(Math.ceil(this.numBits / 4), "0")}`; }
}

const FORMATS = Object.fromEntries([
  ["bf16", "bfloat16", 8, 7], ["fp16", "float16", 5, 10], ["fp32", "float32", 8, 23],
  ["e4m3", "float8 e4m3", 4, 3, false], ["e5m2", "float8 e5m2", 5, 2],
].map((row) => [row[0], new NumberFormat(...row)]));

// ---- exact reals ----

const bitLength = (n) => n === 0n ? 0 : n.toString(2).length;
function floorLog2(num, den) {
  const e = bitLength(num) - bitLength(den);
  const reaches = e >= 0 ? num >= den << BigInt(e) : num << BigInt(-e) >= den;
  return reaches ? e : e - 1;
}

function gcd(a, b) { while (b) [a, b] = [b, a % b]; return a; }

// The real (num / den) * 2^power, in lowest terms.
function finite(negative, num, den = 1n, power = 0) {
  if (power > 0) num <<= BigInt(power);
  if (power < 0) den <<= BigInt(-power);
  const common = num === 0n ? den : gcd(num, den);
  return { kind: "finite", negative, num: num / common, den: den / common };
}

// a - b, for finite reals.
function minus(a, b) {
  const left = (a.negative ? -a.num : a.num) * b.den, right = (b.negative ? -b.num : b.num) * a.den;
  const d = left - right;
  return finite(d < 0n, d < 0n ? -d : d, a.den * b.den);
}

// A finite real as a float64: 60 bits are kept, so it is right but for the last bit. For drawing and percentages.
function approximately(real) {
  if (real.num === 0n) return 0;
  const shift = 60 - floorLog2(real.num, real.den);
  const scaled = shift >= 0 ? (real.num << BigInt(shift)) / real.den : real.num / (real.den << BigInt(-shift));
  return (real.negative ? -1 : 1) * Number(scaled) * 2 ** -Math.min(shift, 1000) * 2 ** -Math.max(0, shift - 1000);
}

// What somebody typed: 0.1, -3e-5, 1/3, 2^-133, 205*2^-11, inf, nan. Throws an Error in words.
function parseReal(text) {
  const said = text.trim().toLowerCase().replaceAll("_", "").replaceAll("\u2212", "-");
  const refusal = () => new Error(`'${text.slice(0, 60)}' is not a number here: write 0.1, -3e-5, 1/3, 2^-133, inf or nan`);
  if (said.length > 400) throw refusal();
  let found = /^([+-]?)(inf|infinity|nan)$/.exec(said);
  if (found) return { kind: found[2] === "nan" ? "nan" : "infinity", negative: found[1] === "-", payload: [1, 2] };
  if ((found = /^([+-]?)(?=\.?\d)(\d*)(?:\.(\d*))?(?:e([+-]?\d{1,6}))?$/.exec(said))) {
    const places = (found[3] || "").length, exponent = Number(found[4] || 0);
    if (Math.abs(exponent) > 2000) throw refusal();
    const power = exponent - places, ten = 10n ** BigInt(Math.abs(power)), digits = BigInt(found[2] + (found[3] || ""));
    return finite(found[1] === "-", power > 0 ? digits * ten : digits, power < 0 ? ten : 1n);
  }
  if ((found = /^([+-]?)(\d+)\/(\d+)$/.exec(said))) {
    if (BigInt(found[3]) === 0n) throw new Error(`'${text.slice(0, 60)}' divides by zero`);
    return finite(found[1] === "-", BigInt(found[2]), BigInt(found[3]));
  }
  if ((found = /^([+-]?)(?:(\d+)\*)?2\^([+-]?\d{1,6})$/.exec(said)) && Math.abs(Number(found[3])) <= 2000) {
    return finite(found[1] === "-", BigInt(found[2] || 1), 1n, Number(found[3]));
  }
  throw refusal();
}

// ---- numbers as text ----

const isDyadic = (den) => (den & (den - 1n)) === 0n;

// All decimal digits of a real whose denominator is a power of two.
function exactDecimal(real) {
  const places = bitLength(real.den) - 1;
  const digits = (real.num * 5n ** BigInt(places)).toString().padStart(places + 1, "0");
  const text = places ? `${digits.slice(0, -places)}.${digits.slice(-places)}`.replace(/0+$/, "").replace(/\.$/, "") : digits;
  return (real.negative && real.num ? "-" : "") + text;
}

// So many significant digits, correctly rounded (ties to even), without zeros at the end.
function shortDecimal(real, digits = 9) {
  if (real.num === 0n) return "0";
  const sign = real.negative ? "-" : "", ten = (n) => 10n ** BigInt(n);
  let exponent = real.num.toString().length - real.den.toString().length;
  const reaches = exponent >= 0 ? real.num >= real.den * ten(exponent) : real.num * ten(-exponent) >= real.den;
  if (!reaches) exponent -= 1;
  const power = exponent - digits + 1;
  const over = power < 0 ? real.num * ten(-power) : real.num, under = power > 0 ? real.den * ten(power) : real.den;
  let whole = over / under;
  const rest = 2n * (over % under);
  if (rest > under || (rest === under && whole & 1n)) whole += 1n;
  if (whole === ten(digits)) { whole /= 10n; exponent += 1; }
  const text = whole.toString(), bare = (t) => t.replace(/0+$/, "").replace(/\.$/, "");
  if (exponent >= -5 && exponent < 0) return `${sign}0.${"0".repeat(-exponent - 1)}${text}`.replace(/0+$/, "");
  const point = exponent >= 0 && exponent < digits ? exponent + 1 : 1;
  const number = bare(`${text.slice(0, point)}.${text.slice(point)}`);
  return sign + number + (exponent >= 0 && exponent < digits ? "" : `e${exponent}`);
}

// A real as text that parseReal reads back without loss.
function realText(real, digits = 30) {
  const sign = real.negative ? "-" : "";
  if (real.kind !== "finite") return sign + { infinity: "inf", nan: "nan" }[real.kind];
  if (!isDyadic(real.den)) return `${sign}${real.num}/${real.den}`;
  const decimal = exactDecimal({ ...real, negative: false });
  if (decimal.length <= digits) return sign + decimal;
  if (real.den > 1n) return `${sign}${real.num}*2^${-(bitLength(real.den) - 1)}`;
  const power = bitLength(real.num & -real.num) - 1;
  return `${sign}${real.num >> BigInt(power)}*2^${power}`;
}

const SUPERSCRIPTS = { "-": "⁻", 0: "⁰", 1: "¹", 2: "²", 3: "³", 4: "⁴", 5: "⁵", 6: "⁶", 7: "⁷", 8: "⁸", 9: "⁹" };
const superscript = (n) => String(n).replace(/[-\d]/g, (c) => SUPERSCRIPTS[c]);
const withMinus = (text) => text.replace(/^-/, "\u2212");
