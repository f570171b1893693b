//! Work that somebody must not wait for: one piece after the other, each in a thread, each with somebody who is told.

use std::sync::mpsc::{self, Receiver};
use std::thread::{self, JoinHandle};

/// Pieces of work in their order. Dropping it waits for nothing.
#[derive(Debug, Default)]
pub struct Background {
    /// The newest piece's thread; and what it hangs up when it has done its work, before it tells anybody.
    last: Option<(JoinHandle<()>, Receiver<()>)>,
}

impl Background {
    /// Do `work` when everything before it is done, and then call `done` with what came of it; the calls come in the order of the work.
    pub fn run<T: Send>(&mut self, work: impl FnOnce() -> T + Send + 'static, done: impl FnOnce(T) + Send + 'static) {
        let previous = self.last.take();
        let (over, worked) = mpsc::channel::<()>();
        let thread = thread::spawn(move || {
            if let Some((_, worked)) = &previous {
                let _ = worked.recv();
            }
            let result = work();
            drop(over);
            if let Some((previous, _)) = previous {
                // (It panics only if its work does, which is reported by the panic itself.)
                let _ = previous.join();
            }
            done(result);
        });
        self.last = Some((thread, worked));
    }

    /// Wait until all work is done. Not until everybody was told: they may be about to call whoever waits here.
    pub fn finish(&mut self) {
        if let Some((_, worked)) = self.last.take() {
            let _ = worked.recv();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};
    use std::time::Duration;

    use super::*;

    #[test]
    fn work_is_done_one_after_the_other_and_told_in_order() {
        let mut background = Background::default();
        let (done, told) = mpsc::channel();
        let (second, from_second) = mpsc::channel();
        let first_done = done.clone();
        // Nobody says so before this is over.
        background.run(
            move || from_second.recv_timeout(Duration::from_millis(100)).is_err(),
            move |alone| first_done.send((1, alone)).unwrap(),
        );
        background.run(move || second.send(()).is_ok(), move |_| done.send((2, true)).unwrap());
        background.finish();
        assert_eq!(told.iter().collect::<Vec<_>>(), [(1, true), (2, true)]);
    }

    #[test]
    fn finishing_does_not_wait_for_those_who_are_told() {
        let lock = Arc::new(Mutex::new(()));
        let mut background = Background::default();
        let held = lock.lock().unwrap();
        for _ in 0..3 {
            let theirs = lock.clone();
            background.run(|| (), move |()| drop(theirs.lock().unwrap()));
        }
        background.finish();
        drop(held);
    }
}
