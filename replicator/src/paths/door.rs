//! Which session a new path belongs to, on the side that is connected to.

use std::collections::HashMap;
use std::sync::{Arc, Weak};

use super::core::MAX_PATHS;
use super::wire::{Frame, SessionId};

/// The sessions that there are. `T` is one.
#[derive(Debug)]
pub struct Door<T> {
    sessions: HashMap<SessionId, Weak<T>>,
}

impl<T> Default for Door<T> {
    fn default() -> Self {
        Self { sessions: HashMap::new() }
    }
}

/// What a path's first frame asks for.
#[derive(Debug)]
pub enum Knock<T> {
    /// A new session ([`Door::admit`] it before the peer is answered).
    Open {
        /// Its name.
        session: SessionId,
        /// Number of the path.
        path: usize,
        /// Of so many.
        paths: usize,
    },
    /// A path of this one.
    Join(Arc<T>, usize),
    /// Neither: a sentence for the peer.
    Refused(String),
}

impl<T> Door<T> {
    /// Look at the first frame of a path.
    pub fn knock(&self, first: &Frame) -> Knock<T> {
        match first {
            Frame::Open { session, path, paths } => {
                if self.sessions.contains_key(session) {
                    Knock::Refused("there is such a session already".into())
                } else if *paths > MAX_PATHS || path >= paths {
                    Knock::Refused(format!("a session has at most {MAX_PATHS} paths"))
                } else {
                    Knock::Open { session: *session, path: *path, paths: *paths }
                }
            }
            Frame::Join { session, path } => match self.sessions.get(session).and_then(Weak::upgrade) {
                Some(known) => Knock::Join(known, *path),
                None => Knock::Refused("the session has ended, or was another process's".into()),
            },
            _ => Knock::Refused("a path begins with the session that it belongs to".into()),
        }
    }

    /// A session is there from here on, as long as somebody holds it.
    pub fn admit(&mut self, id: SessionId, session: &Arc<T>) {
        self.sessions.retain(|_, known| known.strong_count() > 0);
        self.sessions.insert(id, Arc::downgrade(session));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_gets_only_into_the_session_that_it_names_and_only_while_that_lives() {
        let mut door = Door::default();
        let (id, other) = (SessionId([1; 16]), SessionId([2; 16]));
        let join = |session| Frame::Join { session, path: 1 };
        assert!(matches!(door.knock(&join(id)), Knock::Refused(_)));
        assert!(matches!(door.knock(&Frame::Open { session: id, path: 0, paths: 2 }), Knock::Open { paths: 2, .. }));
        let session = Arc::new(7);
        door.admit(id, &session);
        assert!(matches!(door.knock(&join(id)), Knock::Join(s, 1) if *s == 7));
        assert!(matches!(door.knock(&join(other)), Knock::Refused(_)));
        assert!(matches!(door.knock(&Frame::Open { session: id, path: 0, paths: 2 }), Knock::Refused(_)));
        drop(session);
        assert!(matches!(door.knock(&join(id)), Knock::Refused(_)), "a session that has ended takes no path");
    }

    #[test]
    fn nonsense_is_refused() {
        let door = Door::<()>::default();
        let session = SessionId([1; 16]);
        for (path, paths) in [(0, 0), (2, 2), (0, MAX_PATHS + 1)] {
            assert!(matches!(door.knock(&Frame::Open { session, path, paths }), Knock::Refused(_)));
        }
        assert!(matches!(door.knock(&Frame::Ping(1)), Knock::Refused(_)));
    }
}
