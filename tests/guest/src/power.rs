//! The power button: an input device with the key KEY_POWER (the kernel's `button` and `evdev` modules).

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::PathBuf;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::system::{RebootCommand, reboot};

use crate::Guest;
use crate::output::complain;

/// `struct input_event` on a 64-bit machine: two 64-bit words of time, then type, code and value.
const EVENT_BYTES: usize = 24;
const EV_KEY: u16 = 1;
const KEY_POWER: u16 = 116;
/// A new input device is found within this time.
const RESCAN: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };
/// The last line may have to wait for a checkpoint, and for a standby that is just gone.
const FAREWELL: Duration = Duration::from_secs(10);

/// Wait for the button on every input device, those included that appear later.
pub fn watch_buttons(guest: &Guest) {
    let mut devices: BTreeMap<PathBuf, File> = BTreeMap::new();
    loop {
        for path in event_devices() {
            if !devices.contains_key(&path)
                && let Ok(file) = File::open(&path)
            {
                devices.insert(path, file);
            }
        }
        if devices.is_empty() {
            thread::sleep(Duration::from_secs(1));
            continue;
        }
        let ready: Vec<PathBuf> = {
            let mut fds: Vec<PollFd> = devices.values().map(|f| PollFd::new(f, PollFlags::IN)).collect();
            if poll(&mut fds, Some(&RESCAN)).is_err() {
                continue;
            }
            let is_ready = |fd: &PollFd| !fd.revents().is_empty();
            devices.keys().zip(&fds).filter(|(_, fd)| is_ready(fd)).map(|(path, _)| path.clone()).collect()
        };
        for path in ready {
            let mut events = [0u8; 64 * EVENT_BYTES];
            match devices.get(&path).map(|mut file| file.read(&mut events)) {
                Some(Ok(n)) if n > 0 => {
                    if events[..n].chunks_exact(EVENT_BYTES).any(is_power_key_press) {
                        power_off(guest);
                    }
                }
                _ => {
                    devices.remove(&path);
                }
            }
        }
    }
}

fn event_devices() -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir("/dev/input") else { return Vec::new() };
    let is_event = |p: &PathBuf| p.file_name().is_some_and(|n| n.to_string_lossy().starts_with("event"));
    entries.flatten().map(|e| e.path()).filter(is_event).collect()
}

fn is_power_key_press(event: &[u8]) -> bool {
    let word = |at: usize| u16::from_ne_bytes([event[at], event[at + 1]]);
    let pressed = i32::from_ne_bytes([event[20], event[21], event[22], event[23]]) == 1;
    word(16) == EV_KEY && word(18) == KEY_POWER && pressed
}

/// Say goodbye, let the line run dry, switch off. Comes back only when the kernel refuses.
fn power_off(guest: &Guest) {
    rustix::fs::sync();
    let (done, wait) = mpsc::channel();
    // The line may be held up for ever; the machine goes off all the same.
    thread::scope(|scope| {
        scope.spawn(move || {
            guest.output.finish('P', "poweroff");
            let _ = done.send(());
        });
        let _ = wait.recv_timeout(FAREWELL);
        if let Err(why) = reboot(RebootCommand::PowerOff) {
            complain(&format!("the kernel refuses to switch off: {why}"));
        }
    });
}
