// A volume as the server packs it: .nii.gz, float32, little-endian, axes along RAS+.

const HEADER = 352;

// `mark` is what every picture of it says.
export async function readVolume(packed, mark = "SYNTHETIC") {
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  return Object.assign(new Volume(await new Response(stream).arrayBuffer()), { mark });
}

export class Volume {
  constructor(buffer) {
    this.buffer = buffer;
    const view = new DataView(buffer);
    if (view.getInt16(70, true) !== 16) throw new Error("the volume is not of float32");
    this.shape = [1, 2, 3].map((axis) => view.getInt16(40 + 2 * axis, true));
    this.affine = [0, 1, 2].map((row) => [0, 1, 2, 3].map((column) => view.getFloat32(280 + 16 * row + 4 * column, true)));
    const [x, y, z] = this.shape;
    this.data = new Float32Array(buffer, view.getFloat32(108, true), x * y * z); // a first channel comes first
  }

  spacing() {
    return [0, 1, 2].map((axis) => Math.hypot(...this.affine.map((row) => row[axis])));
  }

  at([x, y, z]) {
    return this.data[x + this.shape[0] * (y + this.shape[1] * z)];
  }

  millimetres(voxel) {
    return this.affine.map((row) => row[0] * voxel[0] + row[1] * voxel[1] + row[2] * voxel[2] + row[3]);
  }

  // this - other, as a volume
  minus(other) {
    return this.map((value, i) => value - other.data[i]);
  }

  above() {
    return this.map((value) => Math.max(value, 0));
  }

  below() {
    return this.map((value) => Math.max(-value, 0));
  }

  map(change) {
    const buffer = new ArrayBuffer(HEADER + 4 * this.data.length);
    new Uint8Array(buffer).set(new Uint8Array(this.buffer, 0, HEADER));
    const view = new DataView(buffer);
    view.setInt16(40, 3, true); // one channel
    view.setFloat32(108, HEADER, true);
    const changed = new Volume(buffer);
    for (let i = 0; i < this.data.length; i++) changed.data[i] = change(this.data[i], i);
    return changed;
  }
}
