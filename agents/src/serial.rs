//! `ocf:understudy:serial`: a serial line of an interface board.
use ocf::{Agent, Context, Description, Status};
/// The agent.
#[derive(Debug, Default, Clone, Copy)]
pub struct Serial;
impl Agent for Serial {
    fn description(&self) -> Description {
        Description { name: "serial", version: "0", short: "", long: "", parameters: vec![], actions: vec![] }
    }
    fn start(&self, _: &Context) -> ocf::Result {
        Ok(())
    }
    fn stop(&self, _: &Context) -> ocf::Result {
        Ok(())
    }
    fn monitor(&self, _: &Context) -> ocf::Result<Status> {
        Ok(Status::NotRunning)
    }
}
