// What the server tells, twice a second.  `fetch` and not EventSource: only it can send the token.

const PATH = "v2/dashboard/stream";
const SILENCE = 10000; // milliseconds without an event until the line counts as dead
const KEY = "accelerando-token";

export const token = {
  get: () => sessionStorage.getItem(KEY) || "",
  set: (value) => sessionStorage.setItem(KEY, value),
  drop: () => sessionStorage.removeItem(KEY),
};

export const headers = (more = {}) => (token.get() ? { ...more, Authorization: `Bearer ${token.get()}` } : more);

const pause = (ms) => new Promise((done) => { setTimeout(done, ms); });

// Calls told(state, first) for every event; lost(words) when the line is down; asked() is a promise of a token.
export const follow = async ({ told, lost, asked }) => {
  let wait = 500;
  for (;;) {
    const line = new AbortController();
    let alarm;
    const alive = () => { clearTimeout(alarm); alarm = setTimeout(() => line.abort(), SILENCE); };
    try {
      alive();
      const reply = await fetch(PATH, { headers: headers(), signal: line.signal, cache: "no-store" });
      if (reply.status === 401 || reply.status === 403) {
        clearTimeout(alarm);
        token.drop();
        await asked();
        continue;
      }
      if (!reply.ok) throw new Error(`the server answered ${reply.status}`);
      let first = true;
      for await (const state of events(reply.body.getReader(), alive)) {
        told(state, first);
        first = false;
        wait = 500;
      }
      lost("the server ended the line");
    } catch (error) {
      lost(error.name === "AbortError" ? "the server is silent" : String(error.message || error));
    } finally {
      clearTimeout(alarm);
      line.abort();
    }
    await pause(wait);
    wait = Math.min(2 * wait, 8000);
  }
};

async function* events(reader, alive) {
  const decoder = new TextDecoder();
  let kept = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    alive();
    kept += decoder.decode(value, { stream: true });
    const whole = kept.split("\n\n");
    kept = whole.pop();
    for (const event of whole) {
      if (event.startsWith("event: end")) return;
      if (event.startsWith("data: ")) yield JSON.parse(event.slice(6));
    }
  }
}
