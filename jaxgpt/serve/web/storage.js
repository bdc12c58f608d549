// The browser's storages, which can be switched off or full: then nothing is kept, and nothing fails.

export const local = open("localStorage");
export const session = open("sessionStorage");

function open(name) {
  let storage = null;
  try {
    storage = window[name];
  } catch { /* switched off */ }
  return {
    isOn: storage !== null,
    keys: () => Object.keys(storage ?? {}),
    get: (key) => storage?.getItem(key) ?? null,
    remove: (key) => storage?.removeItem(key),
    // Returns false if there is no room.
    set(key, value) {
      try {
        storage?.setItem(key, value);
        return true;
      } catch {
        return false;
      }
    },
  };
}
