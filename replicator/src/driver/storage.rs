//! What the VMM is asked for that may have to wait for its storage: to seal disks, and to commit. A thread of its own waits for the answer, with the
//! session's connection in its hands; the sender meanwhile asks the VMM for nothing else, and keeps in touch with the standby.

use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use serde_json::Value;
use understudy_protocol::control::{ControlClient, ControlError, Sealed, VmmRequest, call_once};
use understudy_protocol::urgent;

use super::{Driver, Input, VMM_TIMEOUT, trouble};
use crate::sender::Event;

/// Storage that is silent for longer ends the session.
const STORAGE_TIMEOUT: Duration = Duration::from_secs(3600);

pub(super) struct Question {
    attachment: u64,
    client: ControlClient,
    request: VmmRequest,
}

pub(super) struct Answered {
    client: ControlClient,
    request: VmmRequest,
    answer: Result<Value, ControlError>,
}

/// The thread that waits. It ends with its driver.
pub(super) fn start(post: mpsc::Sender<Input>) -> mpsc::Sender<Question> {
    let (ask, questions) = mpsc::channel::<Question>();
    thread::spawn(move || {
        // An epoch's outputs wait for it.
        urgent::this_thread();
        for Question { attachment, mut client, request } in questions {
            let answer = client.set_timeout(STORAGE_TIMEOUT).and_then(|()| client.call::<_, Value>(&request));
            let answered = Answered { client, request, answer };
            if post.send(Input::Answered(attachment, answered)).is_err() {
                return;
            }
        }
    });
    ask
}

impl Driver {
    /// Ask for something that may have to wait for storage. `None`: the answer comes as [`Input::Answered`].
    pub(super) fn ask(&mut self, request: VmmRequest) -> Option<Event> {
        if !self.core.waits_for_storage() {
            return Some(match self.call::<Value>(&request) {
                Ok(answer) => self.heard(&request, answer),
                Err(event) => event,
            });
        }
        let Some(client) = self.vmm.take() else { return Some(Event::VmmLost("it is not attached".into())) };
        let question = Question { attachment: self.attachment, client, request };
        let asked = self.storage.send(question);
        // It ends before its driver only if it panics, which is reported by the panic itself.
        asked.is_err().then(|| Event::VmmLost("nobody waits for its storage".into()))
    }

    pub(super) fn answered(&mut self, answered: Answered) -> Event {
        let Answered { mut client, request, answer } = answered;
        let answer = client.set_timeout(VMM_TIMEOUT).and(answer);
        self.vmm = Some(client);
        match answer {
            Ok(answer) => self.heard(&request, answer),
            Err(e) => trouble(e),
        }
    }

    fn heard(&mut self, request: &VmmRequest, answer: Value) -> Event {
        if !matches!(request, VmmRequest::SealDisks { .. }) {
            return Event::VmmDone;
        }
        match serde_json::from_value::<Sealed>(answer) {
            Ok(sealed) => self.sealed(sealed),
            Err(e) => Event::VmmLost(format!("its answer is not understood: {e}")),
        }
    }

    /// End the VMM, also one that waits for its storage.
    pub(super) fn quit(&mut self) -> Event {
        let result = match &self.vmm {
            Some(_) => self.call::<()>(&VmmRequest::Quit),
            None => {
                let quit = call_once::<_, ()>(self.config.layout.vmm_socket(), &VmmRequest::Quit, VMM_TIMEOUT);
                self.detach();
                quit.map_err(trouble)
            }
        };
        match result {
            // It may close the socket before the reply is read.
            Ok(()) | Err(Event::VmmLost(_)) => Event::VmmDone,
            Err(event) => event,
        }
    }
}
