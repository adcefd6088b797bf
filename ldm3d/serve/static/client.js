// Requests to the server that started this page. Addresses are relative, so that a proxy may put the page anywhere.

export async function modelOf() {
  const answer = await fetch("model");
  if (!answer.ok) throw new Error(await answer.text());
  return answer.json();
}

// The bytes of a .nii.gz; `tell` gets every line that comes before. Aborting the signal cancels it on the server, too.
// A request for what is made of a scan has its name in it; its other part, "spread", says how far to trust it.
export function fetchVolume(request, tell, signal, part = "grid") {
  return fetchLines(request.scan ? `made?part=${part}` : "volume", JSON.stringify(request), tell, signal);
}

// Hand a scan over; as above, with its name.
export function sendScan(file, tell) {
  const kind = [".nii.gz", ".nii", ".mgz"].find((ending) => file.name.toLowerCase().endsWith(ending)) ?? file.name.slice(-4);
  return fetchLines(`scan?kind=${encodeURIComponent(kind)}`, file, tell);
}

async function fetchLines(address, body, tell, signal) {
  const answer = await fetch(address, { method: "POST", body, signal });
  if (!answer.ok) throw new Error(await messageOf(answer));
  const reader = answer.body.getReader();
  let held = new Uint8Array(0);
  for (;;) {
    const end = held.indexOf(10);
    if (end < 0) {
      const { done, value } = await reader.read();
      if (done) throw new Error("the connection to ldm3d was lost");
      held = joined(held, value);
      continue;
    }
    const line = JSON.parse(new TextDecoder().decode(held.subarray(0, end)));
    held = held.subarray(end + 1);
    if (line.error) throw new Error(line.error);
    if (line.bytes === undefined) {
      tell(line);
      continue;
    }
    if (line.remarks) tell({ remarks: line.remarks });
    const content = new Uint8Array(line.bytes);
    content.set(held);
    for (let have = held.length; have < line.bytes; ) {
      const { done, value } = await reader.read();
      if (done) throw new Error("the connection to ldm3d was lost");
      content.set(value, have);
      have += value.length;
    }
    return { content, ...line };
  }
}

export function downloadUrl(format, request) {
  return `download/${format}?request=${encodeURIComponent(JSON.stringify(request))}`;
}

async function messageOf(answer) {
  const text = await answer.text();
  try {
    return JSON.parse(text).error;
  } catch {
    return text;
  }
}

function joined(a, b) {
  const both = new Uint8Array(a.length + b.length);
  both.set(a);
  both.set(b, a.length);
  return both;
}
