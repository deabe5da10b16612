// The sampler's arithmetic, as tinyvllm/kernels/sampling.py has it.

const LOWEST_KEY = 0x80, INFINITE_KEY = 0xFF80, ONE = 2 ** 40;
const f32 = new Float32Array(1), u32 = new Uint32Array(f32.buffer);

// The bfloat16 number that an ordered key stands for.
function valueOfKey(key) {
  u32[0] = (key >= 0x8000 ? key - 0x8000 : 0xFFFF - key) << 16;
  return f32[0];
}

// What is left to draw from. keys: the different logits as ordered keys, largest first; counts: ids with each; the rest
// as in SamplingParams. Returns {greedy, threshold, probability(key) before the filters, kept(key) after them,
// numKept, keptMass: the share of the distribution that was kept}.
function distribution(keys, counts, temperature, topK, topP, vocabSize) {
  const heat = Math.fround(temperature), p = Math.fround(topP), largest = keys.length ? keys[0] : 0;
  if (heat === 0 || largest < LOWEST_KEY || largest >= INFINITE_KEY) {
    return { greedy: true, threshold: largest, probability: () => NaN, kept: (key, first) => first ? 1 : 0, numKept: 1, keptMass: 1 };
  }
  const z = Array.from(keys, (key) => valueOfKey(key) / heat), zMax = z[0];
  const mass = (i) => BigInt(Math.floor(Math.exp(z[i] - zMax) * ONE)) * BigInt(counts[i]);
  let last = keys.length - 1; // the place of the lowest key that is kept
  if (topK > 0 && topK < vocabSize) {
    for (let i = 0, seen = 0; i <= last; i++) if ((seen += counts[i]) >= topK) last = i;
  }
  if (p < 1) {
    let total = 0n, reached = 0n;
    for (let i = 0; i <= last; i++) total += mass(i);
    for (let i = 0; i <= last; i++) {
      reached += mass(i);
      if (Number(reached) >= p * Number(total)) last = i;
    }
  }
  let all = 0, left = 0, numKept = 0;
  for (let i = 0; i < keys.length; i++) {
    all += Math.exp(z[i] - zMax) * counts[i];
    if (i === last) left = all;
    if (i <= last) numKept += counts[i];
  }
  const threshold = keys[last], odds = (key) => Math.exp(valueOfKey(key) / heat - zMax);
  return { greedy: false, threshold, numKept, keptMass: left / all,
    probability: (key) => key < LOWEST_KEY ? 0 : odds(key) / all, kept: (key) => key < threshold ? 0 : odds(key) / left };
}
