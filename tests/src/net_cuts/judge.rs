//! What the network saw, and whether it can be true. Pure: frames and times in.
//!
//! The guest's witness is in every frame and rises with every frame. So of all frames that ever left, in the order in which they left, each has a higher
//! witness than the one before: held packets that were lost leave gaps, which is as on a wire. A machine that went on from an image which had not sent what
//! was seen tells a number that was told before, or answers with fewer answers than were seen.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::guest::{Says, read};

/// What was seen.
#[derive(Debug, Default)]
pub struct Judge {
    /// Newest witness.
    pub witness: u64,
    /// Most answers that the guest said it gave.
    pub answered: u64,
    /// Newest question that was answered.
    question: u64,
    /// Frames with a witness.
    pub frames: u64,
    /// Announcements.
    pub announcements: u64,
    /// When the newest frame with a witness came.
    pub at: Option<Instant>,
    /// Longest time without one since it was last taken.
    pub silence: Duration,
    /// The next frame must be an announcement.
    expects_announcement: bool,
    /// When questions left that have no answer yet.
    asked: BTreeMap<u64, Instant>,
    /// How long answers took.
    pub latencies: Vec<Duration>,
    /// The newest mark that came by.
    pub mark: u64,
    /// The first thing that was wrong.
    pub wrong: Option<String>,
}

impl Judge {
    /// A question leaves.
    pub fn asks(&mut self, number: u64, at: Instant) {
        self.asked.insert(number, at);
    }

    /// The guest will be taken over: announcements come first.
    pub fn expect_announcement(&mut self) {
        self.expects_announcement = true;
        // Their questions may have been lost with the host.
        self.asked.clear();
    }

    /// The survivor's image has this: nothing that was seen may be beyond it.
    pub fn survives(&mut self, witness: u64, answered: u64) {
        if self.witness > witness || self.answered > answered {
            let why = format!(
                "packets told witness {} and {} answers, the image that survived has only {witness} and {answered}",
                self.witness, self.answered
            );
            self.wrong.get_or_insert(why);
        }
    }

    /// A frame of the guest's card came by.
    pub fn frame(&mut self, frame: &[u8], at: Instant) {
        if let Err(why) = self.judge(read(frame), at) {
            self.wrong.get_or_insert(why);
        }
    }

    fn judge(&mut self, says: Says, at: Instant) -> Result<(), String> {
        match says {
            Says::Announcement => {
                self.announcements += 1;
                self.expects_announcement = false;
            }
            Says::Complaint => return Err("the guest says that its memory is not as it left it".into()),
            Says::Other => return Err("the guest's card sent a frame that the guest cannot have sent".into()),
            Says::State { witness, answered, question } => {
                if self.expects_announcement {
                    return Err(format!("witness {witness} came before the network was told where the guest is now"));
                }
                if witness <= self.witness {
                    return Err(format!("the witness went back: {witness} after {}", self.witness));
                }
                if answered < self.answered {
                    return Err(format!("the guest has answered {answered} questions, after {}", self.answered));
                }
                if let Some(question) = question {
                    if question <= self.question || answered == self.answered {
                        let before = (self.question, self.answered);
                        return Err(format!("question {question} was answered as {answered}th, after {before:?}"));
                    }
                    self.question = question;
                    if let Some(asked) = self.asked.remove(&question) {
                        self.latencies.push(at.saturating_duration_since(asked));
                    }
                }
                (self.witness, self.answered) = (witness, answered);
                self.frames += 1;
                if let Some(before) = self.at.replace(at) {
                    self.silence = self.silence.max(at.saturating_duration_since(before));
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(witness: u64, answered: u64, question: Option<u64>) -> Says {
        Says::State { witness, answered, question }
    }

    fn judged(all: &[Says]) -> Result<Judge, String> {
        let mut judge = Judge::default();
        all.iter().try_for_each(|says| judge.judge(*says, Instant::now())).map(|()| judge)
    }

    #[test]
    fn gaps_are_as_on_a_wire_and_what_comes_twice_is_not() {
        assert_eq!(judged(&[told(1, 0, None), told(5, 0, None), told(6, 1, Some(3))]).unwrap().witness, 6);
        assert!(judged(&[told(5, 0, None), told(5, 0, None)]).unwrap_err().contains("went back"));
        assert!(judged(&[told(5, 0, None), told(4, 0, None)]).unwrap_err().contains("went back"));
    }

    #[test]
    fn answers_that_the_survivor_does_not_know_of_are_a_contradiction() {
        assert!(judged(&[told(5, 2, Some(2)), told(6, 1, None)]).unwrap_err().contains("has answered 1"));
        assert!(judged(&[told(5, 2, Some(2)), told(6, 3, Some(2))]).unwrap_err().contains("question 2"));
        assert!(judged(&[told(5, 2, Some(2)), told(6, 2, Some(3))]).unwrap_err().contains("question 3"));
    }

    #[test]
    fn the_first_frame_of_a_new_life_is_an_announcement() {
        let mut judge = judged(&[told(5, 0, None)]).unwrap();
        judge.expect_announcement();
        assert!(judge.judge(told(6, 0, None), Instant::now()).unwrap_err().contains("before the network was told"));
        assert!(judge.judge(Says::Announcement, Instant::now()).is_ok());
        assert!(judge.judge(told(6, 0, None), Instant::now()).is_ok());
    }

    #[test]
    fn the_image_that_survives_has_at_least_what_was_seen() {
        let mut judge = judged(&[told(5, 1, Some(1))]).unwrap();
        judge.survives(5, 1);
        assert_eq!(judge.wrong, None);
        judge.survives(4, 1);
        assert!(judge.wrong.unwrap().contains("only 4"));
    }
}
